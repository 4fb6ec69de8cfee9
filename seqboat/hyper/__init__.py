"""Hypernetworks: a network that generates parameters of any Flax module from a conditioning vector.

spec = hyper.spec(net, x, select="**/kernel")
model = hyper.Hyper(net, hyper.mip(spec, inputs=1))
variables = model.init(key, condition, x)
y = model.apply(variables, condition, x)
"""

from seqboat.hyper.diagnose import Diagnosis, diagnose
from seqboat.hyper.encoding import Encoding
from seqboat.hyper.heads import HyperConfig
from seqboat.hyper.network import Hyper, HyperNetwork, bind, mip, start_from
from seqboat.hyper.spec import Leaf, Spec, spec

__all__ = [
    "Diagnosis",
    "Encoding",
    "Hyper",
    "HyperConfig",
    "HyperNetwork",
    "Leaf",
    "Spec",
    "bind",
    "diagnose",
    "mip",
    "spec",
    "start_from",
]
