# /// script
# requires-python = ">=3.12"
# ///
"""Keep what a run showed, and print the tables of the README from what was kept.

    uv run benchmark/record.py runs/<run> ...     # copy its config and compressed metrics to benchmark/results/
    uv run benchmark/record.py                    # print the tables

benchmark/results/<env>__<script>__<seed>[__<note>]/ holds metrics.jsonl.gz as the run wrote it, and its config.json.
"""

import gzip
import json
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MARIO = "SuperMarioBros-1-1-v0"
LADDER = ["reinforce", "reinforce_baseline", "actor_critic", "a2c", "trpo", "ppo", "dreamerv3"]


def keep(run: Path, note: str = "") -> Path:
    config = json.loads((run / "config.json").read_text())
    env = config["env"].replace("/", "-").replace(":", "-")
    name = f"{env}__{config['script']}__{config['seed']}" + (f"__{note}" if note else "")
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    config["run_dir"] = run.name  # where it lay on that machine is nobody's business
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    lines = (run / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    return folder


def load(folder: Path) -> tuple[dict, list[dict]]:
    """Config and metrics of a run, recorded or as it was left."""
    packed, plain = folder / "metrics.jsonl.gz", folder / "metrics.jsonl"
    text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else plain.read_text()
    return json.loads((folder / "config.json").read_text()), [json.loads(line) for line in text.splitlines()]


def final_table(folders: list[Path]) -> str:
    """Per environment and script: the last evaluation of every seed, and the minutes it took."""
    groups = {}
    for folder in folders:
        config, rows = load(folder)
        last = [row for row in rows if "eval/return_mean" in row][-1]
        groups.setdefault((config["env"], config["script"]), []).append((config["seed"], last))
    lines = [
        "| environment | script | seeds | agent steps | last evaluation, per seed | episodes each | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for (env, script), runs in sorted(groups.items(), key=lambda group: (group[0][0], LADDER.index(group[0][1]))):
        runs.sort(key=lambda run: run[0])
        last = [row for _, row in runs]
        seeds = ", ".join(str(seed) for seed, _ in runs)
        digits = 0 if abs(last[0]["eval/return_mean"]) > 10 else 2
        returns = (f"{row['eval/return_mean']:.{digits}f} ± {row['eval/return_std']:.{digits}f}" for row in last)
        minutes = statistics.mean(row["time"] for row in last) / 60
        ends = [row["global_step"] for row in last]
        steps = f"{min(ends):,} to {max(ends):,}" if len(set(ends)) > 1 else f"{ends[0]:,}"
        episodes = f"{last[0]['eval/episodes']:.0f}"
        lines.append(f"| `{env}` | {script} | {seeds} | {steps} | {', '.join(returns)} | {episodes} | {minutes:.1f} |")
    return "\n".join(lines)


def mario_table(folders: list[Path], every: int = 100_000) -> str:
    """The last 100 training episodes, whose actions are drawn from the policy, at each multiple of `every` steps; what
    stands between slashes is one seed each."""
    runs = [load(folder) for folder in folders]
    seeds = " / ".join(str(config["seed"]) for config, _ in runs)
    lines = [f"| agent steps | flag, seed {seeds} | mean x | return | entropy | minutes |", "|---|---|---|---|---|---|"]
    for step in range(every, runs[0][1][-1]["global_step"] + every // 2, every):
        cells = []
        for _, rows in runs:
            before = [row for row in rows if row["global_step"] <= step]
            recent = [row for row in before if "charts/flag" in row][-100:]
            update = [row for row in before if "losses/entropy" in row][-1]
            flag, x, paid = (
                statistics.mean(row[f"charts/{key}"] for row in recent) for key in ("flag", "x_pos", "episodic_return")
            )
            entropy, minutes = f"{update['losses/entropy']:.2f}", f"{update['time'] / 60:.0f}"
            cells.append((f"{flag:.0%}", f"{x:,.0f}", f"{paid:,.0f}", entropy, minutes))
        lines.append(f"| {step:,} | {' | '.join(' / '.join(column) for column in zip(*cells, strict=True))} |")
    return "\n".join(lines)


def default_speeds() -> dict[str, float]:
    """Agent steps per second of each script on Mario, default flags, as benchmark/speed.py has measured them."""
    results = json.loads((RESULTS / "speed_default.json").read_text())["results"]
    of = {name.partition(": ")[2].removesuffix(".py"): rounds for name, rounds in results.items()}
    return {script: statistics.median(rate for rate, _ in rounds) for script, rounds in of.items()}


def chance() -> list[dict]:
    """Every episode of random buttons on Mario, as benchmark/chance.py has played them."""
    return json.loads((RESULTS / "chance.json").read_text())


def mario_ladder(folders: list[Path], budget: int = 300_000) -> str:
    """What each script had shown after so many agent steps of training: all its episodes, and the last 100 of them;
    what stands between slashes is one seed each. The first line is what random buttons are worth, without training."""
    speeds, runs = default_speeds(), {script: [] for script in LADDER}
    for folder in folders:
        runs[json.loads((folder / "config.json").read_text())["script"]].append(load(folder))
    heads = "script|seeds|agent steps|mean x|best x|flags, last 100|flags, all|return|episodes|steps/s".split("|")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    played = chance()
    x, flags, paid = ([episode[key] for episode in played] for key in ("x_pos", "flag", "episodic_return"))
    cells = "", "", f"{statistics.mean(x):,.0f}", f"{max(x):,}", "", sum(flags), f"{statistics.mean(paid):,.0f}"
    lines.append(f"| random buttons | {' | '.join(map(str, cells))} | {len(played)} |  |")
    for script, seeds in runs.items():
        cells = []
        for config, rows in sorted(seeds, key=lambda run: run[0]["seed"]):
            episodes = [row for row in rows if "charts/flag" in row and row["global_step"] <= budget]
            recent, best = episodes[-100:], max(row["charts/x_pos"] for row in episodes)
            flags = [sum(row["charts/flag"] for row in some) for some in (recent, episodes)]
            x, paid = (statistics.mean(row[f"charts/{key}"] for row in recent) for key in ("x_pos", "episodic_return"))
            steps = min(budget, rows[-1]["global_step"])
            counts = *flags, f"{paid:,.0f}", f"{len(episodes):,}"
            cells.append((config["seed"], f"{steps:,}", f"{x:,.0f}", f"{best:,}", *counts))
        columns = [" / ".join(map(str, column)) for column in zip(*cells, strict=True)]
        columns[1] = cells[0][1] if len({cell[1] for cell in cells}) == 1 else columns[1]
        lines.append(f"| `{script}.py` | {' | '.join(columns)} | {speeds[script]:.0f} |")
    return "\n".join(lines)


def control_return(metrics: list[dict], frames: int) -> float:
    """The mean return of the training episodes in the 10,000 frames (two to a step) that end with these."""
    then = [row for row in metrics if frames - 10_000 < 2 * row["global_step"] <= frames]
    return statistics.mean(row["charts/episodic_return"] for row in then if "charts/episodic_return" in row)


def control_table() -> str:
    """DreamerV3's training returns on the Control Suite beside the published ones, per 10,000 frames; what stands
    between slashes is one seed each."""
    published = json.loads((RESULTS / "published.json").read_text())
    runs = {}
    for folder in sorted(RESULTS.glob("dmc-cartpole-swingup-v0__dreamerv3__*")):
        config, metrics = load(folder)
        runs.setdefault(f"`--size {config['size']}`, step size {config['learning_rate']:g}", []).append(metrics)
    lines = [f"| frames | published, 12m, 5 seeds | {' | '.join(runs)} |", "|---" * (2 + len(runs)) + "|"]
    for row, frames in enumerate(published["frames"]):
        returns = [seed[row] for seed in published["returns"].values()]
        cells = [f"{statistics.mean(returns):.0f} ({min(returns):.0f} to {max(returns):.0f})"]
        for seeds in runs.values():
            whole = [2 * metrics[-1]["global_step"] >= frames for metrics in seeds]
            means = [f"{control_return(m, frames):.0f}" if w else "-" for m, w in zip(seeds, whole, strict=True)]
            cells.append(" / ".join(means))
        lines.append(f"| {frames:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def updates(config: dict, step: int) -> str:
    """How many updates DreamerV3 has made by then, in hundreds: the first when it can replay a batch."""
    batch = config["batch_size"] * config["batch_length"]
    played = step - batch - config["num_envs"] * config["batch_length"]
    return f"{round(played * config['train_ratio'] / batch, -2):,.0f}"


def catch_table(every: int = 5000) -> str:
    """benchmark/catch.py: what DreamerV3's model misses of the picture, what its last 100 episodes of training earn,
    and what PPO's do; what stands between slashes is one seed each."""
    dreams = [load(RESULTS / f"catch-Catch-v0__dreamerv3__{name}") for name in ("1__stopped", "2")]
    plays = [load(RESULTS / f"catch-Catch-v0__ppo__{seed}") for seed in (1, 2)]

    def cell(runs, step, key, last):
        figures = [[r[key] for r in rows if key in r and r["global_step"] <= step][-last:] for _, rows in runs]
        over = [step > rows[-1]["global_step"] for _, rows in runs]
        cells = ("-" if o else f"{statistics.mean(f):.2f}" for f, o in zip(figures, over, strict=True))
        return " / ".join(cells)

    lines = ["| agent steps | updates | image loss, seed 1 / 2 | return | return of PPO |", "|---|---|---|---|---|"]
    for step in range(every, dreams[1][1][-1]["global_step"] + 1, every):
        paid = [cell(runs, step, "charts/episodic_return", 100) for runs in (dreams, plays)]
        image = cell(dreams, step, "losses/image", 1)
        lines.append(f"| {step:,} | {updates(dreams[1][0], step)} | {image} | {' | '.join(paid)} |")
    return "\n".join(lines)


def latest(rows: list[dict], key: str, step: int, count: int = 1) -> float:
    """The mean of the last `count` figures of this name up to a step."""
    return statistics.mean([row[key] for row in rows if key in row and row["global_step"] <= step][-count:])


def so_far(config: dict, rows: list[dict], step: int, slack: int) -> dict[str, str]:
    """What a run on Mario had shown by then; dashes where it had been over for longer than `slack` steps."""
    if step >= rows[-1]["global_step"] + slack:
        return dict.fromkeys(("image", "x", "flags", "minutes"), "-")
    flags = sum(row.get("charts/flag", 0) for row in rows if row["global_step"] <= step)
    x, minutes = latest(rows, "charts/x_pos", step, 100), latest(rows, "time", step) / 60
    image = f"{latest(rows, 'losses/image', step):.1f}" if config["script"] == "dreamerv3" else ""
    return {"image": image, "x": f"{x:,.0f}", "flags": f"{flags}", "minutes": f"{minutes:.0f}"}


def seeds_beside(heads: list[str], groups: list[str], columns: list[tuple[str, int]], every: int) -> str:
    """A table of runs on Mario, as far as those of the first group go: what stands between slashes is one seed each.
    A column is the name of a figure and the number of its group."""
    runs = [[load(RESULTS / f"{MARIO}__{name.format(seed)}") for seed in (1, 2)] for name in groups]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for step in range(every, max(rows[-1]["global_step"] for _, rows in runs[0]) + every // 20, every):
        shown = [[so_far(*run, step, every // 20) for run in group] for group in runs]
        cells = [" / ".join(seed[name] for seed in shown[group]) for name, group in columns]
        lines.append(f"| {step:,} | {updates(runs[0][0][0], step)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def dreams_of_mario() -> str:
    """DreamerV3 on Mario, default flags, beside PPO: what its model misses of the picture, how far the last 100
    episodes of training came, how many have reached the flag so far."""
    heads = "agent steps|updates|image loss, seed 1 / 2|mean x|of PPO|flags|of PPO|minutes|of PPO".split("|")
    columns = [("image", 0), *((name, group) for name in ("x", "flags", "minutes") for group in (0, 1))]
    return seeds_beside(heads, ["dreamerv3__{}", "ppo__{}"], columns, 10_000)


def larger_batches() -> str:
    """DreamerV3 on Mario with batches of 8 x 32, beside the default flags and PPO."""
    heads = "agent steps|updates|image loss, seed 1 / 2|by default|mean x|by default|of PPO|flags|by default|of PPO"
    columns = [("image", 0), ("image", 1), *((name, group) for name in ("x", "flags") for group in (0, 1, 2))]
    columns += [("minutes", 0), ("minutes", 1)]
    names = ["dreamerv3__{}__8x32_stopped", "dreamerv3__{}", "ppo__{}"]
    return seeds_beside([*heads.split("|"), "minutes", "by default"], names, columns, 20_000)


def replayed_more(every: int = 5_000) -> str:
    """DreamerV3 on Mario, batches of 8 x 32, each step replayed 256 and 64 times, beside PPO: the last 100 episodes of
    training."""
    names = "dreamerv3__1__ratio256_stopped", "dreamerv3__1__8x32_stopped", "ppo__1", "ppo__2"
    configs, runs = zip(*(load(RESULTS / f"{MARIO}__{name}") for name in names), strict=True)
    heads = "agent steps|updates|at ratio 64|image loss|at ratio 64|mean x|at ratio 64|of PPO|minutes|at ratio 64"
    lines = [f"| {heads.replace('|', ' | ')} |", "|---" * 10 + "|"]
    for step in range(every, runs[0][-1]["global_step"] + 1, every):
        x = [f"{latest(rows, 'charts/x_pos', step, 100):,.0f}" for rows in runs]
        image = [f"{latest(rows, 'losses/image', step):.1f}" for rows in runs[:2]]
        minutes = [f"{latest(rows, 'time', step) / 60:.0f}" for rows in runs[:2]]
        made = [updates(config, step) for config in configs[:2]]
        lines.append(f"| {' | '.join([f'{step:,}', *made, *image, *x[:2], ' / '.join(x[2:]), *minutes])} |")
    return "\n".join(lines)


def larger_model(every: int = 5_000) -> str:
    """DreamerV3 of size 12m on Mario, on a GPU, beside the smallest size and PPO on two cores and PPO on the same
    machine: the last 100 episodes of training; what stands between slashes is one seed each."""
    names = "dreamerv3__1__12m_gpu_stopped", "dreamerv3__1", "dreamerv3__2"
    names += "ppo__1", "ppo__2", "ppo__1__300k_gpu"
    configs, runs = zip(*(load(RESULTS / f"{MARIO}__{name}") for name in names), strict=True)
    heads = (
        "agent steps|updates|image loss|of 1m, seed 1 / 2|mean x|of 1m|of PPO|of the PPO beside it|minutes|of that PPO"
    )
    lines = [f"| {heads.replace('|', ' | ')} |", "|---" * 10 + "|"]
    end = [row["global_step"] for row in runs[0] if "charts/x_pos" in row][-1]
    for step in [*range(every, end, every), end]:
        image = [f"{latest(rows, 'losses/image', step):.1f}" for rows in runs[:3]]
        x = [f"{latest(rows, 'charts/x_pos', step, 100):,.0f}" for rows in runs]
        minutes = [f"{latest(rows, 'time', step) / 60:.1f}" for rows in (runs[0], runs[-1])]
        figures = [f"{step:,}", updates(configs[0], step), image[0], " / ".join(image[1:])]
        figures += [x[0], " / ".join(x[1:3]), " / ".join(x[3:5]), x[5], *minutes]
        lines.append(f"| {' | '.join(figures)} |")
    return "\n".join(lines)


def nearer_view(every: int = 10_000) -> str:
    """DreamerV3 on Mario with PPO's discount and a larger entropy bonus, batches of 8 x 32, beside its own discount and
    PPO: the last 100 episodes of training; what stands between slashes is one seed each."""
    names = "dreamerv3__1__gamma0.9_entropy_stopped", "dreamerv3__1__8x32_stopped", "dreamerv3__2__8x32_stopped"
    names += "ppo__1", "ppo__2"
    runs = [load(RESULTS / f"{MARIO}__{name}")[1] for name in names]
    heads = "agent steps|mean x|with 0.997, seed 1 / 2|of PPO|entropy|with 0.997"
    lines = [f"| {heads.replace('|', ' | ')} |", "|---" * 6 + "|"]
    for step in range(every, runs[0][-1]["global_step"] + every // 10, every):
        x = [f"{latest(rows, 'charts/x_pos', step, 100):,.0f}" for rows in runs]
        entropy = [f"{latest(rows, 'losses/entropy', step):.2f}" for rows in runs[:3]]
        figures = x[0], " / ".join(x[1:3]), " / ".join(x[3:]), entropy[0], " / ".join(entropy[1:])
        lines.append(f"| {step:,} | {' | '.join(figures)} |")
    return "\n".join(lines)


CHOICES = {  # what differs from PPO's flags with a quarter of its step size: the runs of 300,000 steps
    "nothing": ("1__300k", "2__300k"),
    "`--no-norm-reward`": ("1__300k_no_norm_reward",),
    "`--gamma 0.99`": ("1__300k_gamma0.99",),
    "`--update-epochs 1`": ("1__300k_1epoch",),
    "`--clip-coef 1e9`, no clip": ("1__300k_no_clip",),
    "`--ent-coef 0`": ("1__300k_no_entropy",),
    "`--gae-lambda 1`": ("1__300k_lambda1",),
    "`--no-norm-adv`": ("1__300k_no_norm_adv",),
    "`--learning-rate 5e-4`": ("1__300k_lr5e-4", "2__300k_lr5e-4"),
    "`--learning-rate 1e-3`": ("1__300k_lr1e-3", "2__300k_lr1e-3"),
    "`--learning-rate 2e-3`": ("1__300k_lr2e-3",),
}


def choices_table() -> str:
    """What each of PPO's choices is worth on Mario: the last 100 episodes of training, and the updates of the last
    30,000 steps; what stands between slashes is one seed each."""
    heads = "what differs|mean x|flags, last 100|flags, all|entropy|value loss|explained variance"
    lines = [f"| {heads.replace('|', ' | ')} |", "|---" * 7 + "|"]
    for differs, names in CHOICES.items():
        cells = []
        for name in names:
            _, rows = load(RESULTS / f"{MARIO}__ppo__{name}")
            flags = [row["charts/flag"] for row in rows if "charts/flag" in row]
            late = [row for row in rows if "losses/loss" in row and row["global_step"] > 270_000]
            keys = "entropy", "value_loss", "explained_variance"
            entropy, error, explained = (statistics.mean(row[f"losses/{key}"] for row in late) for key in keys)
            x = f"{latest(rows, 'charts/x_pos', 300_000, 100):,.0f}"
            figures = x, f"{sum(flags[-100:])}", f"{sum(flags)}", f"{entropy:.2f}", f"{error:.3g}", f"{explained:.2f}"
            cells.append(figures)
        columns = (" / ".join(column) for column in zip(*cells, strict=True))
        lines.append(f"| {differs} | {' | '.join(columns)} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """All tables of the README that come from recorded runs, by their headings."""
    folders = sorted(path.parent for path in RESULTS.glob("*/metrics.jsonl.gz") if path.parent.name.count("__") == 2)
    mario = [path for path in folders if path.name.startswith(MARIO)]
    found = {"Last evaluations": final_table(folders)}
    found["Mario, the first 300,000 steps of training"] = mario_ladder(mario)
    ppo = [path for path in folders if path.name.startswith(f"{MARIO}__ppo")]
    found |= {"Mario, PPO": mario_table(ppo), "Cartpole swing-up, DreamerV3": control_table()}
    found |= {"Mario, DreamerV3 beside PPO": dreams_of_mario(), "Mario, more replay": replayed_more()}
    found |= {"Mario, larger batches": larger_batches(), "Mario, a larger model": larger_model()}
    found |= {"Mario, a nearer view": nearer_view(), "Mario, PPO's choices": choices_table()}
    return found | {"Catch": catch_table()}


def main() -> None:
    for run in sys.argv[1:]:
        run, _, note = run.partition("=")  # RUN=NOTE keeps a trial beside the run with the defaults
        if not (Path(run) / "config.json").exists():
            sys.exit(f"{run} is not the folder of a run.")
        print(keep(Path(run), note))
    if not sys.argv[1:]:
        print("\n\n".join(f"{heading}\n\n{table}" for heading, table in tables().items()))


if __name__ == "__main__":
    main()
