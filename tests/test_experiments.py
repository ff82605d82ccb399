"""The experiments in miniature, and that the committed report follows from the committed data."""

import json
import random

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")

from bench.experiments import (  # noqa: E402
    RESULTS,
    countdown,
    countdown_analysis,
    figures,
    gradients,
    tables,
    tiny,
    variance,
    variance_analysis,
)
from bench.experiments import countdown_task as task  # noqa: E402

WARM = tiny.WarmStart(steps=2, batch=4, hidden=16, layers=3, held_out=8)


@pytest.fixture(scope="module")
def model():
    """An untrained model: it writes nonsense of every length."""
    model = tiny.new_model(WARM).eval()
    with torch.no_grad():  # so that the end mark comes often enough for lengths to vary
        model.lm_head.weight[task.END] += 0.4
    return model


class Nonsense:
    """A source of prompts whose reward is 1 for every other response."""

    max_tokens = 12

    def __init__(self, folder, prompts, seed, device):
        self.model = tiny.new_model(WARM).eval()

    def prompt(self, index):
        return torch.tensor(task.problems()[index].prompt())

    def sample(self, index, samples, seed):
        source = random.Random(seed)
        return [
            torch.tensor([source.randrange(task.VOCABULARY) for _ in range(source.randint(2, 12))])
            for _ in range(samples)
        ]

    def rewards(self, index, responses):
        return [float(index != 1 and i % 2) for i in range(len(responses))]


@pytest.fixture
def nonsense(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the unfinished data go under out/ there
    monkeypatch.setattr(variance, "SOURCES", {"tiny": Nonsense})
    monkeypatch.setattr(variance, "SIZE", 256)
    return tmp_path


# The task


def test_supervised_traces_are_right_and_vary_in_length():
    training, held_out = task.split(64)
    assert not set(training) & set(held_out)
    source = random.Random(0)
    traces = [task.trace(p, source, 0.7, 5) for p in held_out]
    rewards = [task.reward(p, t) for p, t in zip(held_out, traces, strict=True)]
    assert rewards == [1.0] * len(held_out)
    lengths = [len(t) for t in traces]
    assert min(lengths) < 20 and max(lengths) > 40 and max(lengths) <= tiny.MAX_TOKENS


def ids(text):
    return [task.IDS[symbol] for symbol in text.split()]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("2 * 3 = 6 6 + 4 = 10 <end>", 1),
        ("3 - 2 = 1 ; 2 * 3 = 6 6 + 4 = 10 <end>", 1),  # a wrong attempt first
        ("2 * 3 = 6 6 + 4 = 10", 0),  # cut off
        ("2 * 3 = 6 6 + 4 = 10 ; <end>", 0),  # the last attempt counts
        ("2 * 3 = 7 7 + 3 = 10 <end>", 0),  # wrong arithmetic, and 3 twice
        ("2 * 3 = 6 <end>", 0),  # 4 unused
        ("5 * 2 = 10 10 * 1 = 10 <end>", 0),  # numbers that were not given
        ("2 : 3 = 6 6 + 4 = 10 <end>", 0),
        ("<end>", 0),
        ("", 0),
    ],
)
def test_reward(response, expected):
    assert task.reward(task.Problem((2, 3, 4), 10), ids(response)) == expected


def test_sampling_gives_the_log_probs_of_a_full_forward_pass(model):
    prompts = torch.tensor([p.prompt() for p in task.problems()[:6]])
    generator = torch.Generator().manual_seed(0)
    tokens, log_probs, mask = tiny.sample(model, prompts, task.END, 20, generator)
    logits = model(input_ids=torch.cat([prompts, tokens], 1)[:, :-1]).logits
    full = logits[:, task.PROMPT_TOKENS - 1 :].log_softmax(-1).gather(2, tokens[:, :, None])[..., 0]
    # float32 sums in another order; past the end nothing is promised
    torch.testing.assert_close(log_probs * mask, full.detach() * mask, atol=1e-5, rtol=0)
    for row, length in zip(tiny.responses(tokens, mask), mask.sum(1).tolist(), strict=True):
        assert task.END not in row[:-1]  # the mask ends at the end mark, which it counts
        assert row[-1] == task.END or length == 20


# Training


def test_weights_of_micro_batches_and_the_common_scale():
    lengths = torch.tensor([1, 2, 3, 4, 10, 20, 30, 40])
    losses = torch.arange(8.0)  # of each token of a sequence
    mean_of_means = torch.stack(
        [(losses[s] * lengths[s]).sum() / lengths[s].sum() for s in (slice(4), slice(4, 8))]
    ).mean()
    weights = countdown.weights_of("dapo micro 4", lengths)
    assert (weights * losses * lengths).sum().item() == pytest.approx(
        mean_of_means.item(), rel=1e-6
    )
    whole = countdown.weights_of("dapo", lengths)
    assert not torch.allclose(weights, whole)
    for method in countdown.METHODS:
        scale = countdown.scale_of(method, "matched", lengths)
        total = scale * countdown.weights_of(method, lengths).sum().item()
        assert total == pytest.approx(1 / tiny.MAX_TOKENS, rel=1e-6)


def test_advantages_are_centred_in_each_group():
    advantages = countdown.advantages_of(torch.tensor([0.0, 1, 1, 1, 0, 0, 0, 0]), 4)
    assert advantages.view(2, 4).sum(1).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert advantages[0] < 0 < advantages[1] and advantages[4:].tolist() == [0] * 4


def small_run(folder, *extra):
    countdown.main(
        "--seeds 1 --steps 2 --prompts 2 --samples 4 --evaluation-prompts 2 --held-out 4 "
        f"--warm-steps 2 --output {folder / 'countdown' / 'runs.jsonl'} --model {folder / 'model'}"
        .split() + list(extra)
    )  # fmt: skip
    return countdown.finished(folder / "countdown" / "runs.jsonl")


def test_countdown_resumes_and_plots(tmp_path, capsys):
    first = small_run(tmp_path, "--methods", "delta_l 1")
    again = small_run(tmp_path, "--methods", "delta_l 1", "grpo")
    assert [run["method"] for run in again] == ["delta_l 1", "grpo"]
    assert again[0] == first[0]  # not run a second time: its seconds are the same
    # The same prompts and the same first rollouts, whatever the method.
    assert again[0]["curve"]["length"][0] == again[1]["curve"]["length"][0]
    assert again[0]["evaluations"][0] == again[1]["evaluations"][0]
    figures.main(["--results", str(tmp_path), "--markdown"])
    assert (tmp_path / "countdown" / "countdown.png").stat().st_size > 10_000
    assert "| GRPO |" in capsys.readouterr().out


def test_paired_interval():
    # t(2) = 4.303; standard error of 1, 2, 3 is 1 / sqrt(3)
    found = countdown_analysis.interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["high"] - 2 == pytest.approx(4.303 / 3**0.5)


def test_only_seeds_that_every_method_has_are_compared():
    runs = [
        {"method": m, "seed": s, "scale": "matched"}
        for m, seeds in (("delta_l 1", (0, 1, 2)), ("grpo", (0, 2)))
        for s in seeds
    ]
    assert [list(by_seed) for by_seed in countdown_analysis.matched(runs).values()] == [[0, 2]] * 2
    runs.append({**runs[0], "scale": "raw"})
    with pytest.raises(ValueError, match="file of its own"):
        countdown_analysis.matched(runs)


def test_runs_of_other_settings_do_not_get_into_a_file(tmp_path, capsys):
    output = tmp_path / "runs.jsonl"
    output.write_text((RESULTS / "countdown" / "runs.jsonl").read_text())
    with pytest.raises(SystemExit):
        countdown.main(["--output", str(output), "--learning-rate", "1"])
    assert "holds runs of other settings" in capsys.readouterr().err


# Gradients


def test_sketch_keeps_inner_products():
    torch.manual_seed(0)
    shapes = [(30, 40), (7,), (50, 50)]
    common = [torch.randn(s) for s in shapes]
    a = [c + torch.randn(s) for c, s in zip(common, shapes, strict=True)]
    b = [c + torch.randn(s) for c, s in zip(common, shapes, strict=True)]
    sketch = gradients.Sketch(a, 1024)
    exact = sum((x * y).sum() for x, y in zip(a, b, strict=True))
    norms = [sum(x.square().sum() for x in v).sqrt() for v in (a, b)]
    # A deviation of one part in sqrt(1024) = 32 of the norms' product; four of them.
    assert abs(sketch(a) @ sketch(b) - exact) < 4 / 32 * norms[0] * norms[1]
    torch.testing.assert_close(
        sketch([x + y for x, y in zip(a, b, strict=True)]), sketch(a) + sketch(b)
    )


def test_score_is_the_gradient_of_the_response_alone(model):
    prompt = torch.tensor(task.problems()[0].prompt())
    response = torch.tensor(ids("2 * 3 = 6 <end>"))
    score = gradients.score_function(model, 64)(torch.cat([prompt, response]), len(prompt))
    loss = torch.nn.functional.cross_entropy(
        model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1],
        response,
        reduction="sum",
    )
    named = dict(model.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    names = gradients.qkv_matrices(model)
    assert len(names) == 9
    for block, chosen in (("all", named), ("qkv", names)):
        norm2 = sum(expected[n].double().square().sum().item() for n in chosen)
        assert score.squared_norm[block] == pytest.approx(norm2, rel=1e-4)  # float32 sums
    assert -score.log_probs.sum().item() == pytest.approx(loss.item(), rel=1e-5)


def test_deviations_against_the_definition():
    g = np.random.default_rng(0).normal(size=(9, 5)) + 3
    groups = np.repeat([0, 1, 2], 3)
    found = variance.deviations(g, (g**2).sum(1), groups)
    for i in range(9):
        others = [j for j in range(9) if groups[j] == groups[i] and j != i]
        assert found[i] == pytest.approx(((g[i] - g[others].mean(0)) ** 2).sum())


def test_variance_resumes_and_collects(nonsense, capsys):
    arguments = ["--models", "tiny", "--samples", "6", "--output", str(nonsense / "variance")]
    variance.main([*arguments, "--prompts", "6"])
    folder = variance.raw_folder("tiny", 6, 0)
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    variance.main([*arguments, "--prompts", "8"])
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(after) == 8 and stamps.items() <= after.items()

    (measured,) = variance_analysis.load(nonsense / "variance")
    assert measured.record["config"]["prompts_dropped"] == 1  # prompt 1 has no advantage
    assert len(measured.table) == 7 * 6
    table = measured.table
    assert table.groupby("prompt").advantage.sum().abs().max() < 1e-6
    # The projection agrees with the exact norms within a few times 1/sqrt(256).
    assert (table.sketch2_all / table.norm2_all - 1).abs().max() < 0.5
    figures.main(["--results", str(nonsense), "--markdown"])
    assert (nonsense / "variance" / "variance.png").stat().st_size > 10_000
    assert tables.LABELS["dapo"] in capsys.readouterr().out


def test_batch_statistics_of_gradients_that_follow_the_law():
    # g_i = mu + sqrt(L_i) z: the paper's model, where everything is known in closed form.
    random_source = np.random.default_rng(0)
    prompts, samples, size = 24, 16, 64
    count = prompts * samples
    lengths = np.ceil(random_source.lognormal(4, 0.8, count))
    mean = random_source.normal(size=size) * 2
    noise = random_source.normal(size=(count, size))
    g = mean + np.sqrt(lengths)[:, None] * noise
    table = pd.DataFrame({"prompt": np.repeat(np.arange(prompts), samples), "length": lengths})
    record = {"prompts": list(range(prompts)), "exponents": variance.EXPONENTS}
    record["gram"] = {"all": variance.gram(g, table)}
    measured = variance_analysis.Measured("law", table, record)
    found = variance_analysis.aggregated(measured, "all")
    for method in ("delta_l 0.5", "dr_grpo"):
        expected = variance_analysis.predicted_ratio(measured, method, beta=1.0)
        ratio = found[f"variance ratio {method}"]
        assert abs(ratio["value"] - expected) < 4 * ratio["error"]
        assert ratio["error"] < 0.3 * expected
    batch = lengths[: (prompts - 1) // 2 * samples]
    expected = size / (1 / batch).sum() / (mean @ mean)
    cv2 = found["cv2 delta_l 1"]
    assert abs(cv2["value"] - expected) < 4 * cv2["error"] + 0.1 * expected  # lengths of one batch
    assert found["cosine of means delta_l 1, dr_grpo"]["value"] == pytest.approx(1, abs=0.05)


# What is committed


def approximately(value):
    """Equal to five digits: sums of float64 in another order, on another machine."""
    if isinstance(value, dict):
        return {k: approximately(v) for k, v in value.items()}
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-5, abs=1e-7, nan_ok=True)
    return value


def test_committed_variance_summary_follows_from_the_data():
    folder = RESULTS / "variance"
    committed = json.loads((folder / "summary.json").read_text())
    report = (RESULTS.parent / "REPORT.md").read_text()
    for measured in variance_analysis.load(folder):
        assert variance_analysis.summarize(measured) == approximately(committed[measured.name])
    assert tables.exponents(committed) in report
    assert tables.batches(committed) in report
    for block in committed.values():
        for numbers in block["blocks"].values():
            assert min(numbers["same_batch_cosine_minimum"].values()) >= 1 - 1e-6


def test_committed_countdown_summary_follows_from_the_data():
    folder = RESULTS / "countdown"
    committed = json.loads((folder / "summary.json").read_text())
    start = json.loads((folder / "start.json").read_text())
    assert sorted(committed) == sorted(path.stem for path in folder.glob("runs*.jsonl"))
    for name, summary in committed.items():
        runs = countdown.finished(folder / f"{name}.jsonl")
        assert countdown_analysis.summarize(runs, start) == approximately(summary)
        assert len(summary["seeds"]) >= 3 and len(summary["methods"]) == len(countdown.METHODS)
        assert tables.countdown(summary) in (RESULTS.parent / "REPORT.md").read_text()


def test_committed_figures_are_small():
    for path in RESULTS.rglob("*.png"):
        assert path.stat().st_size < 150_000, path
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 3_000_000
