"""The small file: its header, the manifest, and the container that holds the tensors."""
