"""Train an unmodified Mixture-of-Experts model on many devices by rewriting its graph."""

from moptrace import errors as errors
from moptrace.api import parallelize as parallelize
from moptrace.balance import Balance as Balance
from moptrace.core import Level as Level
from moptrace.core import Pass as Pass
from moptrace.core import Program as Program
from moptrace.core import chain as chain
from moptrace.dropping import Dropping as Dropping
from moptrace.parallel import ParallelModule as ParallelModule
from moptrace.placement import Layout as Layout
from moptrace.plan import Plan as Plan
from moptrace.precision import MixedPrecisionPolicy as MixedPrecisionPolicy
from moptrace.step import train_step as train_step
from moptrace.trace import trace as trace

__version__ = "0.1.0"
