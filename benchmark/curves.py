# /// script
# requires-python = ">=3.12"
# dependencies = ["matplotlib>=3.10,<4", "numpy>=2.1,<3"]
# ///
"""From recorded runs to figures.

    uv run benchmark/curves.py                             # every figure of the README, into images/
    uv run benchmark/curves.py runs/a runs/b               # your own runs: return (and flag, x) into curves.svg;
                                                           # those that differ only in their seeds become one curve

The README's figures are drawn from benchmark/results and from nothing else. Each is drawn twice, for light and for dark
pages. Curves are means over the last episodes of training, whose actions are drawn from the policy, at every point of
the axis; with several seeds the line is their mean and the band reaches from the lowest to the highest of them.
"""

import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from record import LADDER, RESULTS, chance, default_speeds, load

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "images"
MARIO = "SuperMarioBros-1-1-v0"
COLOURS = dict(zip(LADDER, ["#999999", "#CC79A7", "#D55E00", "#E69F00", "#009E73", "#0072B2", "#56B4E9"], strict=True))
TRIALS = {  # what the figure of DreamerV3 beside PPO shows beside the default flags
    "batches of 8 x 32, 2 seeds": ("#009E73", "1__8x32_stopped", "2__8x32_stopped"),
    "8 x 32, train ratio 256": ("#D55E00", "1__ratio256_stopped"),
    "8 x 32, gamma 0.9": ("#CC79A7", "1__gamma0.9_entropy_stopped"),
    "size 12m, on a GPU": ("#8C564B", "1__12m_gpu_stopped"),
}
COLOURS |= {name: colour for name, (colour, *_) in TRIALS.items()}
LABELS = {script: script.replace("_", " + ") if "baseline" in script else script for script in LADDER}
UNLIKE = "seed run_dir resume num_threads eval_episodes eval_every save_every log_every capture_video track".split()
UNLIKE += "wandb_project_name wandb_entity versions device commit".split()
MODES = {"light": ("#24292f", "#d0d7de"), "dark": ("#e6edf3", "#3d444d")}  # ink and grid


def recorded(env: str, script: str) -> list[list[dict]]:
    """The metrics of every recorded seed; trials, with a note behind the seed, are left out."""
    return [load(path)[1] for path in sorted(RESULTS.glob(f"{env}__{script}__*")) if path.name.count("__") == 2]


def recent(rows: list[dict], key: str, points: np.ndarray, axis: str = "global_step", window: int = 100) -> np.ndarray:
    """The mean of `key` over the last `window` episodes before each point; NaN where there is none yet, or no more."""
    episodes = [row for row in rows if key in row]
    if not episodes:
        return np.full(len(points), np.nan)
    where = np.array([row[axis] for row in episodes])
    total = np.concatenate([[0.0], np.cumsum([row[key] for row in episodes])])
    ends = np.searchsorted(where, points, side="right")
    begins = np.maximum(ends - window, 0)
    with np.errstate(invalid="ignore"):
        means = (total[ends] - total[begins]) / (ends - begins)
    return np.where(points > max(row[axis] for row in rows) * 1.02, np.nan, means)


def draw(panel, runs: list[list[dict]], key: str, points, name: str, axis="global_step", window=100) -> None:
    """The mean over the seeds, and a band from the lowest to the highest, as far as all of them go."""
    if runs:
        curves = np.array([recent(rows, key, points, axis, window) for rows in runs])
        known = ~np.isnan(curves).any(0)
        look = {"color": COLOURS.get(name), "label": LABELS.get(name, name), "linewidth": 1.6}
        (line,) = panel.plot(points[known], curves[:, known].mean(0), **look)
        if len(runs) > 1:
            low, high = curves[:, known].min(0), curves[:, known].max(0)
            panel.fill_between(points[known], low, high, color=line.get_color(), alpha=0.3, lw=0)


def thousands(panel) -> None:
    panel.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0")


def by_chance(*panels, at: float = 0.13) -> None:
    """The mean x of random buttons: below this line nothing has been learnt. Its name stands in the first panel."""
    x = np.mean([episode["x_pos"] for episode in chance()])
    for panel in panels:
        panel.axhline(x, color="gray", linestyle="--", linewidth=1)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 9}
    panels[0].annotate("random buttons", (at, x), xytext=(0, -11), **place)


def cartpole(mode: str):
    """All scripts, 5 seeds (DreamerV3: 3)."""
    figure, panel = plt.subplots(figsize=(6, 3.8))
    points = np.geomspace(1_000, 300_000, 160)
    for script in LADDER:
        draw(panel, recorded("CartPole-v1", script), "charts/episodic_return", points, script, window=20)
    panel.set(xscale="log", xlabel="agent steps", ylabel="return, last 20 episodes", title="CartPole-v1", ylim=(0, 510))
    thousands(panel)
    return figure, panel


def mario(mode: str):
    """All scripts on level 1-1, by steps and by the minutes that these take at the measured speed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.8), sharey=True)
    points, speeds = np.linspace(5_000, 300_000, 150), default_speeds()
    for script in LADDER:
        runs = recorded(MARIO, script)
        draw(left, runs, "charts/x_pos", points, script)
        timed = [[row | {"minutes": row["global_step"] / speeds[script] / 60} for row in rows] for rows in runs]
        draw(right, timed, "charts/x_pos", points / speeds[script] / 60, script, "minutes")
    left.set(xlabel="agent steps", ylabel="mean x, last 100 episodes", ylim=(0, 3300))
    right.set(xlabel="minutes at the measured steps/s", xlim=(0, 60))
    for panel in (left, right):
        panel.axhline(3161, color="gray", linestyle=":", linewidth=1)
    left.annotate("flag", (2_000, 3161), textcoords="offset points", xytext=(0, -11), fontsize=9)
    by_chance(left, right)
    thousands(left)
    return figure, left


def mario_ppo(mode: str):
    """PPO's long run: how far, and how often to the flag."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.5, 3.2))
    points = np.linspace(10_000, 1_000_000, 200)
    runs = recorded(MARIO, "ppo")
    draw(left, runs, "charts/x_pos", points, "ppo")
    draw(right, runs, "charts/flag", points, "ppo")
    left.set(xlabel="agent steps", ylabel="mean x, last 100 episodes", ylim=(0, 3300))
    right.set(xlabel="agent steps", ylabel="flag, last 100 episodes", ylim=(0, 1))
    right.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    thousands(left)
    thousands(right)
    return figure, None


def efficiency(mode: str):
    """PPO beside DreamerV3, by steps and by minutes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.5, 3.4), sharey=True)
    lines = [(script, recorded(MARIO, script)) for script in ("ppo", "dreamerv3")]
    for name, (_, *runs) in TRIALS.items():  # a line for each run
        lines += [(name, [load(RESULTS / f"{MARIO}__dreamerv3__{run}")[1]]) for run in runs]
    dreams = [rows for name, runs in lines[1:] for rows in runs]
    end, minutes = (max(rows[-1][key] for rows in dreams) for key in ("global_step", "time"))
    for name, runs in lines:
        draw(left, runs, "charts/x_pos", np.linspace(1_000, end, 150), name, window=50)
        draw(right, runs, "charts/x_pos", np.linspace(60, minutes, 150), name, "time", window=50)
    left.set(xlabel="agent steps", ylabel="mean x, last 50 episodes", ylim=(0, 3300))
    by_chance(left, right, at=0.6)
    right.set(xlabel="minutes of the runs' own clocks")
    right.xaxis.set_major_formatter(lambda x, _: f"{x / 60:.0f}")
    right.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(3600))
    thousands(left)
    return figure, left


def trpo(mode: str):
    """TRPO's own account of its updates on Mario: KL against its bound, promised against real improvement."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.5, 3.2))
    rows = [row for row in recorded(MARIO, "trpo")[0] if "losses/kl" in row]
    steps, ink = np.array([row["global_step"] for row in rows]), MODES[mode][0]
    tries = sorted({round(row["losses/line_search_steps"]) for row in rows})
    for tried in tries:
        of = np.array([round(row["losses/line_search_steps"]) == tried for row in rows])
        colour = plt.get_cmap("viridis_r")(0.2 + {"light": 0.8, "dark": 0.5}[mode] * (tried - 1) / max(tries))
        dots = {"linestyle": "", "marker": ".", "markersize": 4, "color": colour}
        label = f"{tried} line search step{'s' * (tried != 1)}: {of.sum()}"
        left.plot(steps[of], [row["losses/kl"] for row, ok in zip(rows, of, strict=True) if ok], **dots, label=label)
        chosen = [row for row, ok in zip(rows, of, strict=True) if ok]
        promised, real = ([row[f"losses/{name}"] for row in chosen] for name in ("expected_improvement", "improvement"))
        right.plot(promised, real, **dots)
    left.axhline(0.01, color=ink, linestyle=":", linewidth=1)
    left.set(xlabel="agent steps", ylabel="KL(old || new)", ylim=(0, 0.012))
    left.annotate("bound", (steps[0], 0.01), textcoords="offset points", xytext=(2, 3), fontsize=9)
    right.plot([0, 0.05], [0, 0.05], color=ink, linestyle=":", linewidth=1)
    right.set(xlabel="improvement, as promised", ylabel="improvement, in fact", xlim=(0, 0.055), ylim=(0, 0.055))
    outside = sum(max(row["losses/improvement"], row["losses/expected_improvement"]) > 0.055 for row in rows)
    right.annotate(f"{outside} update{'s' * (outside != 1)} outside", (0.002, 0.051), fontsize=9)
    thousands(left)
    return figure, left


def unstable(mode: str):
    """Actor-critic beside A2C on Mario: how far, and how undecided the policy is."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.5, 3.4))
    points = np.linspace(5_000, 300_000, 150)
    for script in ("actor_critic", "a2c"):
        runs = recorded(MARIO, script)
        draw(left, runs, "charts/x_pos", points, script)
        draw(right, runs, "losses/entropy", points, script, window=10)
    left.set(xlabel="agent steps", ylabel="mean x, last 100 episodes", ylim=(0, 1200))
    by_chance(left)
    right.set(xlabel="agent steps", ylabel="entropy of the policy (nats)", ylim=(0, 2))
    thousands(left)
    thousands(right)
    return figure, left


def variance(mode: str):
    """The noise of the policy gradient, as benchmark/variance.py has measured it."""
    figure, panel = plt.subplots(figsize=(6, 3.6))
    results = json.loads((RESULTS / "variance.json").read_text())
    steps = [int(step) for step in results]
    for name, script, label in (
        ("without", "reinforce", "return G"),
        ("batch mean", "reinforce", "G - mean of the batch"),
        ("with", "reinforce_baseline", "G - V(s)"),
    ):
        figures, line = [row[name] for row in results.values()], "--" if name == "batch mean" else "-"
        panel.plot(steps, figures, line, color=COLOURS[script], marker="o", markersize=4, label=label)
    panel.set(xscale="log", yscale="log", xlabel="agent steps", ylabel="variance of the gradient, 8 episodes")
    panel.set_xticks(steps, minor=False)
    panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    thousands(panel)
    return figure, panel


FIGURES = [variance, cartpole, mario, mario_ppo, efficiency, trpo, unstable]


def style(mode: str) -> None:
    ink, grid = MODES[mode]
    plt.rcdefaults()
    plt.rcParams |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    plt.rcParams |= {"axes.edgecolor": grid, "grid.color": grid, "axes.grid": True, "axes.axisbelow": True}
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "0"}
    plt.rcParams |= {"font.family": "sans-serif", "font.size": 10, "figure.constrained_layout.use": True}


def save(figure, panel, path: Path, ncols: int = 3) -> None:
    """No background: the page's own shows through. No date: the same runs give the same file."""
    lines = panel.get_legend_handles_labels()[0] if panel is not None else []
    if lines:
        named = {line.get_label(): line for line in lines}  # two of one name have one entry
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=ncols, frameon=False)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def own(folders: list[Path]) -> None:
    """The return, and for Mario flag and x, of any runs, by steps and by minutes. Runs that differ in nothing but their
    seed are one curve: their mean, and a band from the lowest to the highest."""
    groups = {}
    for folder in folders:
        try:
            config, rows = load(folder)
        except OSError as error:
            sys.exit(f"{folder} cannot be read as a run ({error.strerror}); name the folder of one, as in runs/<run>.")
        flags = {name: flag for name, flag in config.items() if name not in UNLIKE}
        rows = [row | {"minutes": row["time"] / 60} for row in rows]
        groups.setdefault(json.dumps(flags, sort_keys=True), []).append((config["seed"], folder.name, rows))
    keys = ["charts/episodic_return", "charts/flag", "charts/x_pos"]
    keys = [key for key in keys if any(key in row for runs in groups.values() for *_, rows in runs for row in rows)]
    if not keys:
        sys.exit("No episode has ended in these runs yet; there is nothing to draw.")
    figure, panels = plt.subplots(len(keys), 2, figsize=(9, 3 * len(keys)), squeeze=False, sharey="row")
    for row, key in zip(panels, keys, strict=True):
        for panel, axis in zip(row, ("global_step", "minutes"), strict=True):
            for runs in groups.values():
                seeds, names, rows = zip(*runs, strict=True)
                label = names[0] + (f" and its like, seeds {', '.join(map(str, seeds))}" if len(runs) > 1 else "")
                points = np.linspace(0, max(metrics[-1][axis] for metrics in rows), 300)
                draw(panel, rows, key, points, label, axis)
            panel.set_xlabel("agent steps" if axis == "global_step" else axis)
        row[0].set_ylabel(f"{key.partition('/')[2]}, mean of 100")
        if key == "charts/flag":
            row[0].set_ylim(-0.02, 1.02)
        thousands(row[0])
    save(figure, panels[0][0], Path("curves.svg"), ncols=1)
    print("curves.svg")


def main() -> None:
    if sys.argv[1:]:
        style("light")
        return own([Path(name) for name in sys.argv[1:]])
    IMAGES.mkdir(exist_ok=True)
    for mode in MODES:
        style(mode)
        for function in FIGURES:
            path = IMAGES / f"{function.__name__}-{mode}.svg"
            save(*function(mode), path)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
