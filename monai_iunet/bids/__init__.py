"""The BIDS app: images of a BIDS data set in, BIDS derivatives out (bids-specification.readthedocs.io)."""
