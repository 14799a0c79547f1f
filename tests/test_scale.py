"""What many devices, hosts and particles cost: measured small, and modelled."""

import jax
import pytest

from launch.benchmarks import device, scale
from launch.job import build, describe
from launch.scale_model import Constants, outer_step, progress_rate, stops_paying, worth
from tests import jobs


def test_what_a_program_exchanges():
    """Read off XLA's text: tuples, several types, starts of asynchronous exchanges once."""
    program = """
  %a = (f32[3,2]{1,0}, f32[]) all-reduce(f32[3,2]{1,0} %x, f32[] %y), channel_id=1
  %b = bf16[4]{0} collective-permute(bf16[4]{0} %z)
  %c = s8[2]{0} all-gather-start(s8[1]{0} %w)
  %d = s8[2]{0} all-gather-done(s8[2]{0} %c)
  %e = f32[99]{0} add(f32[99]{0} %x, f32[99]{0} %x)
"""
    assert scale.exchanged_in(program) == 4 * 7 + 2 * 4 + 2


def test_a_plan_for_hosts_that_are_not_there():
    """A device of four hosts has a quarter of the particles, and all of theta."""
    config = jobs.changed(
        num_devices=2, estimator=jobs.cfg.estimator("pes", num_particles=32, truncation=4)
    )
    plans = [describe(build(config, None, hosts), False, hosts) for hosts in (1, 4)]
    assert "pairs per device         8" in plans[0] and "pairs per device         2" in plans[1]
    assert "4 hosts with 2 x cpu" in plans[1] and "hosts" not in plans[0].partition("devices  ")[2]
    with pytest.raises(ValueError, match=r"3 processes with 2 each\).* 24 and 36"):
        build(config, None, 3)


@pytest.mark.slow
def test_the_memory_of_a_device_falls_with_the_hosts():
    config = jobs.changed(
        num_devices=1, estimator=jobs.cfg.estimator("pes", num_particles=64, truncation=4)
    )
    job = build(config, None)
    spec = jax.eval_shape(job.init)
    states = []
    for hosts in (1, 4):
        placed = device.devices.placed_spec(spec, 1, job.axes, hosts)
        states.append(job.step.lower(placed).compile().memory_analysis().argument_size_in_bytes)
    assert states[0] > 2 * states[1]


@pytest.mark.slow
def test_the_cases_run_small():
    rows = list(scale.lines(places=((1, 1), (2, 1)), populations=(8,), steps=1))
    assert [row["what"] for row in rows] == ["memory", "checkpoint"] + ["step"] * 4
    steps = rows[2:]
    assert [row["devices"] for row in steps] == [1, 1, 2, 2]
    # Theta, and a few numbers.
    sent = {row["bytes_exchanged_per_device"] - row["bytes_of_theta"] for row in steps[2:]}
    assert len(sent) == 1 and 0 < sent.pop() < 100
    (wide, narrow) = device.lines(1, sizes=(8,), rounds=1)
    assert wide["optimizer_products"] == "float32" and narrow["optimizer_products"] == "bfloat16"
    assert wide["inner_runs"] == 8 and wide["inner_steps_per_second"] > 0
    assert wide["share_of_chip_rate"] is None  # Not known of a CPU.


SIMPLE = Constants(spread=0.0, save_seconds=0.0, particle_bytes=0.0, between_failures=1e12)


def test_the_model_of_a_step_in_closed_form():
    """Equal hosts that never fail: the work, and what halving and doubling takes."""
    step = outer_step(64, SIMPLE)
    exchange = 12 * SIMPLE.latency + 2 * 63 / 64 * SIMPLE.theta / SIMPLE.bandwidth
    assert step.compute == pytest.approx(SIMPLE.particles * SIMPLE.particle_seconds)
    assert step.exchange == pytest.approx(exchange) and step.stragglers == pytest.approx(0)
    assert step.failures == pytest.approx(0, abs=1e-6) and step.checkpoints == 0
    assert outer_step(1, SIMPLE).total == pytest.approx(step.compute)
    # In four steps of five 32 bytes a host.
    costs = 6 * SIMPLE.latency + 63 * 32 / SIMPLE.bandwidth
    assert outer_step(64, SIMPLE, hybrid=True).exchange == pytest.approx((exchange + 4 * costs) / 5)


def test_failures_and_checkpoints_in_the_model():
    of = SIMPLE._replace(save_seconds=1.0, between_failures=1e6)
    step = outer_step(100, of)
    mean_time = 1e4
    interval = (2 * 1.0 * mean_time) ** 0.5
    bare = step.compute + step.exchange
    assert step.checkpoints == pytest.approx(bare / interval)
    lost = (60 + 20 + interval / 2) / mean_time
    assert step.failures == pytest.approx((bare + step.checkpoints) * lost)


def test_where_more_hosts_stop_paying():
    """Without costs of the hosts themselves, where the population passes the noise scale."""
    free = SIMPLE._replace(latency=0.0, theta=0.0, noise_scale=1000.0)
    assert worth(10**9, free) == pytest.approx(1)
    assert progress_rate(4, free) == pytest.approx((1 + 1000 / 64) / (1 + 1000 / 256))
    # 2 (B + P) / (B + 2 P) is 1.1 at P = 4.5 B, 70 hosts.
    assert stops_paying(free) == 128
    assert stops_paying(free._replace(theta=4e8)) < stops_paying(free)
