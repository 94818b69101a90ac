"""Pictures of images, labels and of the network."""
