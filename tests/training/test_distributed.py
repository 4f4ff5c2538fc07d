"""Many ranks: the bits of one, uneven splits, ranks without a query, disagreements found at start, a killed rank."""

import os
import signal
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from on_ranks import on_ranks
from tiny import lm_batch, tiny_adapted
from transformers import TrainingArguments

from adazeta import UserError, ZerothOrder, ZOTrainer
from adazeta.distributed import Ranks, open_journal
from adazeta.journal import NAME, read
from adazeta.losses import lm_loss
from adazeta.objectives import ClassObjective

SETTINGS = {"lr": 0.1, "eps": 0.05, "momentum": 0.9, "run_seed": 7, "probes_per_forward": 1}
STEPS = 4


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # forked from here
    yield
    torch.set_num_threads(before)


def losses_one_by_one(model, batch):
    """A loss whose bits do not depend on the rows beside a row: what is spread over ranks then is the same."""
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(len(batch["labels"]))]
    return torch.cat([lm_loss(model, row) for row in rows])


def train(opt, part=slice(None), first=0):
    for k in range(first, STEPS):
        batch = {name: value[part] for name, value in lm_batch(6, seed=k).items()}
        opt.estimate(losses_one_by_one, batch)
        opt.step()
    return opt


@pytest.mark.parametrize(
    ("size", "data", "settings"),
    [
        (3, 1, {"queries": 4}),  # uneven
        (3, 1, {"queries": 2}),  # a rank without a query
        (2, 1, {"queries": 3, "directions": "example", "difference": "forward"}),
        (2, 2, {"queries": 2}),
        (4, 2, {"queries": 3, "difference": "forward"}),
    ],
)
def test_the_bits_of_one_rank(tmp_path, size, data, settings):
    model = tiny_adapted()
    settings = {**SETTINGS, **settings}

    def work(rank):
        ranks = Ranks(data, check_every=1)
        opt = ZerothOrder(model, ranks=ranks, **settings)
        open_journal(opt, tmp_path / f"many-{size}" / NAME)
        row = ranks.rank // ranks.columns  # 6 examples as 4 and 2
        train(opt, slice(None) if data == 1 else (slice(0, 4), slice(4, 6))[row])
        torch.save((opt.fingerprint(), opt.rows, opt.evaluations), tmp_path / f"rank-{rank}")
        if opt.journal:
            opt.journal.close()

    statuses, errors = on_ranks(size, tmp_path / "work", work)
    assert statuses == [0] * size, errors
    found = {torch.load(tmp_path / f"rank-{rank}") for rank in range(size)}
    one = ZerothOrder(model, **settings)
    one.write_journal(tmp_path / "one" / NAME)
    train(one)
    assert found == {(one.fingerprint(), one.rows, one.evaluations)}
    many, alone = read(tmp_path / f"many-{size}" / NAME).steps, read(tmp_path / "one" / NAME).steps
    for a, b in zip(many, alone):
        assert a.coefficients.tobytes() == b.coefficients.tobytes() and (a.loss, a.digest) == (b.loss, b.digest)
    assert len(many) == STEPS


def test_ranks_that_disagree_are_found_at_the_start(tmp_path):
    model, other = tiny_adapted(), tiny_adapted(seed=1)

    def work(rank):
        for name, model_of_1, settings in (
            ("config.eps", model, {"eps": 0.06}),
            ("base_sha256", other, {}),
            ("config.lr", model, {"lr": 0.2}),
            ("run_seed", model, {"run_seed": 8}),
        ):
            changed = settings if rank == 1 else {}
            opt = ZerothOrder(model_of_1 if rank == 1 else model, ranks=Ranks(), **{**SETTINGS, **changed})
            with pytest.raises(UserError, match=f"rank 1 has another {name} than rank 0"):
                open_journal(opt, tmp_path / NAME)

    assert on_ranks(2, tmp_path / "work", work) == ([0, 0], [])
    assert not (tmp_path / NAME).exists()


def test_what_fails_on_a_rank_fails_on_all(tmp_path, monkeypatch):
    model = tiny_adapted()

    def work(rank):
        ranks = Ranks()
        with pytest.raises(RuntimeError, match="rank 1: ZeroDivisionError: division by zero"):
            ranks.together(lambda: 1 / (1 - rank), "a test")
        if rank == 1:
            monkeypatch.setattr("adazeta.distributed.describe_run", lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match="rank 1: ZeroDivisionError"):
            ranks.agree(ZerothOrder(model, ranks=ranks, **SETTINGS))
        if rank == 1:
            monkeypatch.undo()
        monkeypatch.setattr("adazeta.distributed.code_sha256", lambda: f"digest {rank}")
        with pytest.raises(UserError, match="rank 1 has another code than rank 0: 'digest 1', expected 'digest 0'"):
            ranks.agree(ZerothOrder(model, ranks=ranks, **SETTINGS))

    assert on_ranks(2, tmp_path / "work", work) == ([0, 0], [])


def test_a_rank_that_hangs_or_leaves_is_told_in_one_line(tmp_path):
    def work(rank):
        ranks = Ranks()
        if rank == 1:
            time.sleep(4)
            return
        with pytest.raises(UserError, match="step 3: rank 0 no longer reaches the other ranks .*; start all again"):
            ranks.same_batch(4, step=3)

    assert on_ranks(2, tmp_path / "work", work, timeout=timedelta(seconds=2)) == ([0, 0], [])


def test_the_parts_of_a_batch(tmp_path):
    def work(rank):
        batch, ranks = {"ids": torch.arange(10).view(5, 2), "name": "x"}, Ranks(4)
        assert ranks.part(batch)["ids"][:, 0].tolist() == [[0], [2], [4], [6, 8]][rank]
        assert ranks.part({"ids": torch.zeros(2, 1)})["ids"].shape == (rank % 2, 1)
        assert ranks.part(batch)["name"] == "x"
        answers = {**batch, "references": [["a"], ["b"], ["c"], ["d"], ["e"]], "names": ["no", "yes"]}
        assert ranks.part(answers)["references"] == [[["a"]], [["b"]], [["c"]], [["d"], ["e"]]][rank]
        assert ranks.part(answers)["names"] == ["no", "yes"]

    assert on_ranks(4, tmp_path / "work", work) == ([0] * 4, [])


def test_a_rank_with_another_theta_is_found(tmp_path):
    model = tiny_adapted()

    def work(rank):
        opt = ZerothOrder(model, ranks=Ranks(check_every=2), queries=2, **SETTINGS)
        with pytest.raises(RuntimeError, match="before step 2 theta on rank 1 differs from that on rank 0"):
            for k in range(STEPS):
                opt.estimate(lm_loss, lm_batch(4, seed=k))
                opt.step()
                if rank == 1 and k == 0:
                    model.base_model.theta()[3] += 1e-7

    assert on_ranks(2, tmp_path / "work", work) == ([0, 0], [])


def test_a_journal_that_goes_back_is_for_one_process(tmp_path):
    model = tiny_adapted()
    settings = {**SETTINGS, "queries": 2}
    one = ZerothOrder(model, **settings)
    one.write_journal(tmp_path / NAME)
    train(one)
    one.go_back(1)
    one.journal.close()

    def work(rank):
        opt = ZerothOrder(model, ranks=Ranks(), **settings)
        with pytest.raises(UserError, match="goes back at step 4, .*: go on in one process"):
            open_journal(opt, tmp_path / NAME, resume=True)

    assert on_ranks(2, tmp_path / "work", work) == ([0, 0], [])


def test_a_rank_that_parts_is_found_at_its_first_step_and_at_its_last(tmp_path):
    model = tiny_adapted()
    settings = {**SETTINGS, "queries": 2}
    whole = ZerothOrder(model, **settings)
    whole.write_journal(tmp_path / NAME)
    train(whole)
    whole.journal.close()
    model = tiny_adapted()

    def work(rank):
        opt = ZerothOrder(model, ranks=Ranks(), **settings)
        open_journal(opt, tmp_path / NAME, resume=True)
        train(opt)
        opt.ranks.check_end(opt)
        number = model.base_model.theta()[3].item()
        if rank == 1:
            model.base_model.theta()[3] += 1e-3
        with pytest.raises(UserError, match="before step 4 theta on rank 1 differs from that on rank 0"):
            opt.estimate(losses_one_by_one, lm_batch(6))
        with pytest.raises(UserError, match="after step 3 theta on rank 1 differs from that on rank 0"):
            opt.ranks.check_end(opt)
        model.base_model.theta()[3] = number
        opt.param_groups[0]["lr"] /= 1 + rank
        with pytest.raises(UserError, match="step 4: rank 1 has another learning rate than rank 0: 0.05, expected 0.1"):
            opt.estimate(losses_one_by_one, lm_batch(6))

    assert on_ranks(2, tmp_path / "work", work) == ([0, 0], [])


def test_ranks_that_were_killed_rejoin_from_the_journal(tmp_path):
    model = tiny_adapted()

    def life(resume, last):
        def work(rank):
            opt = ZerothOrder(model, ranks=Ranks(check_every=1), queries=2, **SETTINGS)
            open_journal(opt, tmp_path / NAME, resume)
            for k in range(STEPS):
                if k == last and rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                opt.estimate(losses_one_by_one, lm_batch(6, seed=k))
                opt.step()
            torch.save(opt.fingerprint(), tmp_path / f"rank-{rank}")

        return on_ranks(2, tmp_path / f"life-{resume}", work)

    statuses, _ = life(False, 2)
    assert statuses == [1, -signal.SIGKILL]  # the other is told by gloo
    assert len(read(tmp_path / NAME, repair=True).steps) == 2
    assert life(True, -1) == ([0, 0], [])
    one = train(ZerothOrder(model, queries=2, **SETTINGS))
    assert {torch.load(tmp_path / f"rank-{rank}") for rank in range(2)} == {one.fingerprint()}


def test_all_ranks_begin_with_the_numbers_of_the_journal(tmp_path):
    whole = ZerothOrder(tiny_adapted(noise=0.2), queries=2, **SETTINGS)
    whole.write_journal(tmp_path / NAME)
    train(whole)
    whole.journal.close()
    model = tiny_adapted()

    def work(rank):
        opt = ZerothOrder(model, ranks=Ranks(check_every=1), queries=2, **SETTINGS)
        open_journal(opt, tmp_path / NAME, resume=True)
        assert train(opt).fingerprint() == whole.fingerprint()
        opt.estimate(losses_one_by_one, lm_batch(4))  # compares digests

    assert on_ranks(2, tmp_path / "work", work) == ([0, 0], [])


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [({"resume": True}, UserError, "cannot open the journal"), ({"about": {"x": {1}}}, Exception, "serializable")],
)
def test_what_goes_wrong_on_rank_0_is_raised_on_all(tmp_path, keywords, kind, message):
    model = tiny_adapted()

    def work(rank):
        opt = ZerothOrder(model, ranks=Ranks(), queries=2, **SETTINGS)
        with pytest.raises(kind, match=message if rank == 0 else f"rank 0: .*{message}"):
            open_journal(opt, tmp_path / NAME, **keywords)

    assert on_ranks(2, tmp_path / "work", work) == ([0, 0], [])


@pytest.mark.parametrize("directions", ["example", 3])
def test_batches_of_different_sizes_are_named(tmp_path, directions):
    model = tiny_adapted()

    def work(rank):
        opt = ZerothOrder(model, ranks=Ranks(), queries=2, directions=directions, **SETTINGS)
        with pytest.raises(RuntimeError, match=r"step 0: ranks .* got batches of \[\[3, 4\]\] examples"):
            opt.estimate(losses_one_by_one, lm_batch(3 + rank))

    assert on_ranks(2, tmp_path / "work", work) == ([0, 0], [])


def test_a_message_is_small_and_bad_grids_are_refused(tmp_path):
    def work(rank):
        sent, gather = [], dist.all_gather

        def weighed(received, message, **more):
            sent.append(message.nbytes)
            gather(received, message, **more)

        dist.all_gather = weighed
        opt = ZerothOrder(tiny_adapted(), ranks=Ranks(), queries=5, **SETTINGS)
        train(opt)
        assert sent == [64 + 8 * 3] * STEPS
        for arguments in ((3,), (0,)):
            with pytest.raises(ValueError, match="expected a divisor"):
                Ranks(*arguments)
        with pytest.raises(ValueError, match="only one of the ranks has"):
            ZerothOrder(tiny_adapted(), ranks=Ranks(), on_divergence="rollback")
        with pytest.raises(ValueError, match="spread over ranks that share directions"):
            ZerothOrder(tiny_adapted(), ranks=Ranks(2), directions="example")
        together = ClassObjective(SimpleNamespace(scores=None), "f1")  # no mean over examples
        refused = pytest.raises(ValueError, match="spread over 2 parts, and this loss is one of all examples")
        with refused:
            ZerothOrder(tiny_adapted(), ranks=Ranks(2)).estimate(together, lm_batch(4))
        with refused:
            ZOTrainer(tiny_adapted(), TrainingArguments(str(tmp_path)), loss=together, ranks=Ranks(2))
        Ranks(1).check_loss(together)  # queries alone are shared out

    assert on_ranks(2, tmp_path / "work", work) == ([0, 0], [])
