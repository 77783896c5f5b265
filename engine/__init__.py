"""What infer.py is made of: devices, networks, pixels."""
