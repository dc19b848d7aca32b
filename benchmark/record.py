# /// script
# requires-python = ">=3.12"
# ///
"""Keep what a run showed, and draw up the tables of the README from what was kept.

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
        steps, episodes = f"{last[0]['global_step']:,}", f"{last[0]['eval/episodes']:.0f}"
        lines.append(f"| `{env}` | {script} | {seeds} | {steps} | {', '.join(returns)} | {episodes} | {minutes:.1f} |")
    return "\n".join(lines)


def mario_table(folders: list[Path], every: int = 200_000) -> str:
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


def mario_ladder(folders: list[Path], budget: int = 300_000) -> str:
    """What each script had shown after so many agent steps of training: all its episodes, and the last 100 of them."""
    speeds = default_speeds()
    lines = [
        "| script | agent steps | mean x | best x | flags, last 100 | flags, all | return | episodes | steps/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for folder in sorted(folders, key=lambda folder: LADDER.index(load(folder)[0]["script"])):
        config, rows = load(folder)
        episodes = [row for row in rows if "charts/flag" in row and row["global_step"] <= budget]
        recent, best = episodes[-100:], max(row["charts/x_pos"] for row in episodes)
        flags = [sum(row["charts/flag"] for row in some) for some in (recent, episodes)]
        x, paid = (statistics.mean(row[f"charts/{key}"] for row in recent) for key in ("x_pos", "episodic_return"))
        name = f"`{config['script']}.py` | {min(budget, rows[-1]['global_step']):,}"
        counts = f"{flags[0]} | {flags[1]} | {paid:,.0f} | {len(episodes):,} | {speeds[config['script']]:.0f}"
        lines.append(f"| {name} | {x:,.0f} | {best:,} | {counts} |")
    return "\n".join(lines)


def control_table() -> str:
    """DreamerV3's training returns on the Control Suite beside the published ones, per 10,000 frames: 5,000 steps."""
    published = json.loads((RESULTS / "published.json").read_text())
    runs = [load(folder) for folder in sorted(RESULTS.glob("dmc-cartpole-swingup-v0__dreamerv3__*"))]
    heads = [f"`--size {config['size']}`, step size {config['learning_rate']:g}" for config, _ in runs]
    lines = [f"| frames | published, 12m, 5 seeds | {' | '.join(heads)} |", "|---" * (2 + len(runs)) + "|"]
    for row, frames in enumerate(published["frames"]):
        returns = [seed[row] for seed in published["returns"].values()]
        cells = [f"{statistics.mean(returns):.0f} ({min(returns):.0f} to {max(returns):.0f})"]
        for _, metrics in runs:
            mine = [
                line["charts/episodic_return"]
                for line in metrics
                if "charts/episodic_return" in line and frames - 10_000 < 2 * line["global_step"] <= frames
            ]
            whole = 2 * metrics[-1]["global_step"] >= frames
            cells.append(f"{statistics.mean(mine):.0f}" if whole else "")
        lines.append(f"| {frames:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
        flags = dreams[1][0]
        batch = flags["batch_size"] * flags["batch_length"]
        updates = (step - batch - flags["num_envs"] * flags["batch_length"]) * flags["train_ratio"] / batch
        paid = [cell(runs, step, "charts/episodic_return", 100) for runs in (dreams, plays)]
        lines.append(
            f"| {step:,} | {round(updates, -2):,.0f} | {cell(dreams, step, 'losses/image', 1)} | {' | '.join(paid)} |"
        )
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """All tables of the README that come from recorded runs, by their headings."""
    folders = sorted(path.parent for path in RESULTS.glob("*/metrics.jsonl.gz") if path.parent.name.count("__") == 2)
    mario = [path for path in folders if path.name.startswith("SuperMarioBros-1-1") and path.name.endswith("__1")]
    found = {"Last evaluations": final_table(folders)}
    found["Mario, the first 300,000 steps of training, seed 1"] = mario_ladder(mario)
    ppo = [path for path in folders if path.name.startswith("SuperMarioBros-1-1-v0__ppo")]
    found |= {"Mario, PPO": mario_table(ppo), "Cartpole swing-up, DreamerV3": control_table()}
    return found | {"Catch": catch_table()}


def main() -> None:
    for run in sys.argv[1:]:
        run, _, note = run.partition("=")  # RUN=NOTE keeps a trial beside the run with the defaults
        print(keep(Path(run), note))
    if not sys.argv[1:]:
        print("\n\n".join(f"{heading}\n\n{table}" for heading, table in tables().items()))


if __name__ == "__main__":
    main()
