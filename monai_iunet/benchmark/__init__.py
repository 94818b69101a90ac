"""The claims about memory and speed, measured: ours and the peers' side by side, in one run."""
