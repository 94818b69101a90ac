"""Reading and writing of images, labels and weights."""
