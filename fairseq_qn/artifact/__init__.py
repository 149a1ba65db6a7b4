"""The small file: packed bits, the codec of each scheme, the manifest, and the container that holds them."""
