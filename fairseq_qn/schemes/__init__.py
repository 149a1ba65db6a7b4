"""One file a scheme. What they share, and how to add one, says base.py."""

from fairseq_qn.schemes.base import Scheme
from fairseq_qn.schemes.integer import Integer
from fairseq_qn.schemes.kernel import Kernel
from fairseq_qn.schemes.learned_bits import LearnedBits
from fairseq_qn.schemes.product import Product

SCHEMES: dict[str, type[Scheme]] = {
    scheme.name: scheme for scheme in (Product, Integer, LearnedBits, Kernel)
}
