"""1, 2, 4 and 8 processes compute the same thing."""

import socket
import time

import pytest
import torch

from tests import (
    forked,  # noqa: F401 (what the server of forks has imported)
    helpers,
)

pytestmark = pytest.mark.slow

WORLDS = (1, 2, 4, 8)
RUNS = helpers.TTT_RUNS | helpers.STREAM_RUNS


def spawn(world, folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    method = "spawn" if world == 2 else "forkserver"  # two with hashes, and so sets, of their own
    context = torch.multiprocessing.start_processes(
        helpers.worker, (world, str(folder), port), nprocs=world, join=False, start_method=method
    )
    deadline = time.monotonic() + 300
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"one of {world} processes waits for ever")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """World size -> what each rank left, in the order of ranks."""
    folder = helpers.write_shards(tmp_path_factory.mktemp("shards"))
    for world in WORLDS:
        spawn(world, folder)
    return {w: [torch.load(folder / f"{w}-{r}.pt", weights_only=False) for r in range(w)] for w in WORLDS}


def distance(weights, reference):
    a, b = (torch.cat([w.flatten() for w in weights]).double() for weights in (weights, reference))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("world", WORLDS[1:])
def test_training_losses_and_gradient_norms_are_the_same(found, world):
    (losses, norms), (one_losses, one_norms) = (sum(r["steps"] for r in found[w]).T for w in (world, 1))
    assert len(losses) == 8 and (one_norms > 0.3).all()  # every step is clipped
    torch.testing.assert_close(losses, one_losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(norms / world, one_norms, rtol=5e-3, atol=0)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_the_frontiers_losses_are_the_same(found, world):
    """With loops that begin half-way, lanes, gates and documents in pieces that divide no span."""
    losses, one_losses = (sum(r["frontier"] for r in found[w])[:, 0] for w in (world, 1))
    assert len(losses) == 4
    torch.testing.assert_close(losses, one_losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_trained_weights_are_the_same_but_for_bf16_noise(found, world):
    assert distance(found[world][0]["weights"], found[1][0]["weights"]) < 5e-3


@pytest.mark.parametrize("world", WORLDS[1:])
def test_all_ranks_hold_the_very_same_weights(found, world):
    first, *others = found[world]
    for other in others:
        for a, b in [(first, other)] + [(first[name], other[name]) for name in RUNS]:
            assert all(torch.equal(w, v) for w, v in zip(a["weights"], b["weights"], strict=True))


@pytest.mark.parametrize("stride", [32, 5])
@pytest.mark.parametrize("world", WORLDS[1:])
def test_scores_are_the_same(found, world, stride):
    one = found[1][0][f"stride{stride}"]
    assert one.tokens == 260
    for r in found[world]:
        assert r[f"stride{stride}"] == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_streamed_scores_are_the_same(found, world):
    one = found[1][0]["streamed"]
    assert one.tokens == 1999
    for r in found[world]:
        assert r["streamed"] == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_ttt_is_the_same(found, world, run):
    """Chunks that no world size divides evenly among sequences; in a stream, a last one of a few
    positions."""
    one = found[1][0][run]
    epochs = [epochs for _, epochs in one["records"]]
    assert epochs == (
        [2, 1, 3, 1, 3, 0] if run in helpers.TTT_RUNS else [0, 1, 1, 1, 1, 0]
    )  # as hard as they scored
    for r in found[world]:
        assert [epochs for _, epochs in r[run]["records"]] == epochs
        for (score, _), (one_score, _) in zip(r[run]["records"], one["records"], strict=True):
            assert score[1:] == one_score[1:]
            assert score.val_loss == pytest.approx(one_score.val_loss, abs=1e-4)
        assert r[run]["after"].val_loss == pytest.approx(one["after"].val_loss, abs=1e-4)
        assert distance(r[run]["weights"], one["weights"]) < (1e-3 if "sgd" not in run else 1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_no_score_knows_a_later_token(found, world):
    """Streaming with TTT, of which each rank has a part: what comes before the changed token is scored
    bitwise the same."""
    differs = torch.zeros(260, dtype=torch.bool)
    for rank in found[world]:
        one, other = rank["changed"]
        assert torch.equal(one.isnan(), other.isnan())
        differs |= ~one.isnan() & (one != other)
    assert not differs[: helpers.CHANGED - 1].any() and differs[helpers.CHANGED - 1 :].any()


@pytest.mark.parametrize("world", WORLDS)
def test_an_error_on_one_rank_is_raised_on_all(found, world):
    assert [r["error"] for r in found[world]] == [f"rank {world - 1} failed"] * world
