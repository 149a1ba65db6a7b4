"""torch modules over quant/: the weight view while a model trains, compressed modules on the way out."""
