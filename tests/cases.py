"""A model with samples, observed, with all its candidates: what tests of curves start from."""

import contextlib

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.candidates.make import make_candidates
from rdoq_onnx.candidates.moment_passes import collect
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps, Store
from rdoq_onnx.curves.large import LargeBench
from rdoq_onnx.curves.measure import measure_network
from rdoq_onnx.curves.steps import Bench
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.observation.batching import separated
from rdoq_onnx.observation.inputs import samples_for
from rdoq_onnx.observation.observe import observe
from rdoq_onnx.observation.parts import whole
from rdoq_onnx.probing.probe import Prober, exact
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.scratch import Scratch
from rdoq_onnx.system.threads import workers

RUNTIME = Runtime("cpu", 2)


def ignore(done):
    """Nobody watches."""


def measured_whole(network, config, samples, progress=None):
    """The curves of `network` with no samples held out."""
    steps = Steps(Store(), progress or Progress(), "test")
    return measure_network(network, config, SampleSplit.whole(samples, config.seed), RUNTIME, steps)


class Case:
    def __init__(self, model, calibration, count=None, widths=tuple(range(8)), batching=None):
        config = Config(samples=count)
        self.model = read_normalized(model)[1]
        self.network = analyse(self.model, config.selection)
        self.samples = separated(self.network, samples_for(self.model, calibration, config), RUNTIME)
        self.seen = observe(self.network, whole(o.name for o in self.network.model.graph.output), self.samples, RUNTIME)
        self.batching = batching or self.seen.batching
        with workers(2) as pool:
            moments = collect(self.network, self.samples, self.batching.size, RUNTIME, pool, ignore)
            self.candidates = make_candidates(self.network, widths, self.seen.ranges, moments, pool)
        self.prober = Prober(self.network, self.samples, self.seen.metric, RUNTIME, self.batching)

    def taylor(self, batch=None, seed=0):
        with workers(2) as pool:
            return first_order(self.plan(pool, batch, seed), self.candidates, ignore)

    def plan(self, pool, batch=None, seed=0, runtime=RUNTIME, around=None):
        size = batch or self.batching.size
        return ReversePlan(self.network, self.samples, self.seen.metric, runtime, pool, size, seed, around)

    def probe(self):
        return exact(self.candidates, self.prober, ignore)


@contextlib.contextmanager
def large_bench(model, calibration, folder=None, **settings):
    """Yield the bench of a network that is measured one layer at a time, whatever its size."""
    config = Config(threads=2, **settings)
    network = analyse(read_normalized(model)[1], config.selection)
    samples = separated(network, samples_for(network.model, calibration, config), RUNTIME)
    split, steps = SampleSplit.whole(samples, config.seed), Steps(Store(scratch=Scratch(folder)), Progress(), "test")
    seen = observe(network, whole(o.name for o in network.model.graph.output), samples, RUNTIME)
    with workers(2) as pool:
        yield LargeBench.of(Bench(network, config, split, seen, RUNTIME, pool, steps))
