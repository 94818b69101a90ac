"""What the invertible layers are made of."""
