"""The house around the scripts: set-up, README, style."""

import ast
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, SCRIPTS, metrics, short

README = (ROOT / "README.md").read_text()
PAGES = README + (ROOT / "benchmark" / "results" / "README.md").read_text()  # what it leaves to the records


def metadata(path):
    """The inline metadata (PEP 723) of a script."""
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", path.read_text())
    return tomllib.loads("\n".join(line[2:] for line in block[1].splitlines()))


def test_each_script_declares_what_requirements_declare():
    required = (ROOT / "requirements.txt").read_text().splitlines()
    for name in SCRIPTS:
        assert metadata(ROOT / f"{name}.py") == {"requires-python": ">=3.13,<3.14", "dependencies": required}
    for name in ("speed", "variance", "chance", "dmc"):  # which run the scripts
        declared = metadata(ROOT / "benchmark" / f"{name}.py")["dependencies"]
        assert [line for line in declared if line in required] == required


def test_bounds_not_pins():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert re.fullmatch(r"[\w-]+(\[[\w,-]+\])?>=[\d.]+,<\d+(; platform_machine != 'aarch64')?", line), line


def test_nothing_has_to_be_compiled():
    """Wheels of all that is required, on every platform that the README names."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    resolve = [uv, "pip", "compile", "-q", "--only-binary", ":all:", "--python", sys.executable]
    platforms = "x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin", "x86_64-pc-windows-msvc"
    commands = {name: [*resolve, "--python-platform", name, ROOT / "requirements.txt"] for name in platforms}
    for name, (code, out, err) in together(commands).items():
        assert code == 0 and "nes-py==" in out and ("box2d==" in out) == (name != platforms[1]), (name, err)


def test_no_script_imports_another_file_of_this_repository():
    here = {path.stem for folder in (ROOT, ROOT / "tests", ROOT / "benchmark") for path in folder.glob("*.py")}
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not here & {str(module).split(".")[0] for module in names}


def test_syntax_is_valid_on_python_3_12():
    for name in SCRIPTS:
        ast.parse((ROOT / f"{name}.py").read_text(), feature_version=(3, 12))


def together(commands, **more):
    """Run a command per script, all at once -> {script: (exit code, stdout, stderr)}."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = {name: subprocess.Popen(command, **pipes, **more) for name, command in commands.items()}
    output = {name: process.communicate(timeout=300) for name, process in processes.items()}
    return {name: (processes[name].returncode, *output[name]) for name in processes}


def test_one_file_in_an_empty_folder(tmp_path):
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    commands = {}
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
        flags = ["--env", "CartPole-v1", *short(name)[2:], "--total-timesteps", "64", "--run-dir", f"run-{name}"]
        commands[name] = [uv, "run", "--python", sys.executable, f"{name}.py", *flags]
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for name, (code, out, err) in together(commands, cwd=tmp_path, env=environ).items():
        assert code == 0, err
        assert metrics(tmp_path / f"run-{name}")[-1]["eval/episodes"] == 2
        assert f"Watch it: uv run {name}.py --evaluate run-{name} --capture-video" in out


def test_help_is_all_a_newcomer_needs():
    commands = {name: [sys.executable, ROOT / f"{name}.py", "--help"] for name in SCRIPTS}
    for name, (code, out, err) in together(commands).items():
        assert code == 0 and err == ""
        script, text = __import__(name), re.sub(r"[│\s]+", " ", out)
        assert script.__doc__.partition("\n\n")[0] in text
        for field in vars(script.Args()):
            after = text.partition(f" --{field.replace('_', '-')}")[2]
            assert re.match(r"[, \w-]* [\w{}|.,-]+ \w+", after), f"--{field} has no explanation"


def commands(text):
    """The lines of a text that call a script -> (script, flags)."""
    for line in text.replace("\\\n", " ").splitlines():
        call = re.search(r"(?:uv run|python) (\w+)\.py (.*)", line.strip("| `").partition("`")[0])
        if call and call[1] in SCRIPTS and "<" not in line:
            yield call[1], shlex.split(call[2])


def test_every_command_in_readme_and_docstrings_parses(monkeypatch):
    texts = [PAGES, *(__import__(name).__doc__ for name in SCRIPTS)]
    found = [command for text in texts for command in commands(text)]
    assert len(found) >= 5
    for name, flags in found:
        script = __import__(name)
        if {"--resume", "--evaluate", "--help"} & set(flags):
            continue
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        args, state = script.parse()  # a value that cannot work ends here with exit code 2
        assert state == {} and args.total_timesteps > 0


def test_every_long_command_of_the_readme_was_run(monkeypatch):
    """Its flags are those of a run in benchmark/results, but for the seed and what leaves training as it is."""
    idle = {"seed", "run_dir", "resume", "num_threads", "cuda", "capture_video", "log_every", "save_every"}
    recorded = [json.loads(path.read_text()) for path in (ROOT / "benchmark" / "results").glob("*/config.json")]
    checked = 0
    for name, flags in commands(PAGES):
        if {"--resume", "--evaluate", "--help"} & set(flags) or "corridor:Corridor-v0" in flags:
            continue
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        args = {flag: value for flag, value in vars(__import__(name).parse()[0]).items() if flag not in idle}
        runs = [run for run in recorded if run["script"] == name]
        assert any(all(run.get(flag, value) == value for flag, value in args.items()) for run in runs), (name, flags)
        checked += 1
    assert checked >= 14


def test_the_environment_of_the_readme_is_learnt(call, tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(import gymnasium.*?class Corridor.*?)```", README, re.DOTALL)
    (tmp_path / "corridor.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    ((name, flags),) = [command for command in commands(README) if "corridor:Corridor-v0" in command[1]]
    assert call(__import__(name), *flags, "--run-dir", "run") == 0
    assert metrics("run")[-1]["eval/return_mean"] > 0.88  # ten steps to the goal, 0.01 each, return 0.91


def test_the_commands_of_the_readme_for_a_run_that_is_there(call, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ppo = __import__("ppo")
    first = [*short("ppo"), "--env", "CartPole-v1", "--total-timesteps", 64, "--run-dir", "runs/one"]
    assert call(ppo, *first) == 0
    shown = README.partition("## What a run gives you")[2].partition("\n## ")[0]
    found = [shlex.split(line) for line in re.findall(r"uv run ppo\.py ([^`\n]*<run>[^`\n]*)", shown)]
    assert len(found) == 5
    for flags in found:
        flags = ["128" if flag == "2000000" else flag.replace("<run>", "one") for flag in flags]
        whole = "--resume" in flags and "--total-timesteps" not in flags  # it ends by saying so
        assert call(ppo, *flags) == (2 if whole else 0)
    assert "checkpoint.pt: 100 episodes, return" in capsys.readouterr().out
    assert metrics("runs/one")[-1]["global_step"] == 128 and (tmp_path / "runs/one/videos/best.mp4").exists()


def test_ci_calls_the_test_command_of_the_readme():
    last = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert last in README.splitlines()
    assert (ROOT / ".python-version").read_text().strip() == "3.13"


def test_links_of_the_readme_lead_somewhere():
    headings = {}
    for page in ("README.md", "benchmark/results/README.md"):
        found = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
        headings[page] = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        page, _, heading = target.partition("#")
        assert page.startswith("https://") or (ROOT / page).exists(), target
        assert not heading or page.startswith("https://") or heading in headings[page or "README.md"], target


def test_the_tables_of_the_readme_are_what_was_recorded():
    sys.path.append(str(ROOT / "benchmark"))
    import record

    for heading, table in record.tables().items():
        assert PAGES.count(table) == 1, heading


def test_the_speeds_of_the_readme_are_what_was_measured():
    results = ROOT / "benchmark" / "results"
    measured = {}
    for section in json.loads((results / "speed.json").read_text()).values():
        measured |= section["results"]  # later ones count
    sections = json.loads((results / "speed.json").read_text())
    ratios = []
    for section in ("Mario, PPO, 3 rounds with a later commit", "Mario, 1 round"):
        rounds = sections[section]["results"]
        pairs = zip(rounds["Mario, PPO: ppo.py"], rounds["Mario, PPO: SB3, Gymnasium's wrappers"], strict=True)
        ratios += [f"{ours[0] / theirs[0]:.2f}" for ours, theirs in pairs]
    sentence = "three rounds gave {}, {} and {} x SB3 with Gymnasium's wrappers, a single round before {}."
    assert sentence.format(*ratios) in " ".join(PAGES.split())
    rounds = sections["CartPole, PPO, 3 rounds with a later commit"]["results"]
    ours, theirs = (statistics.median(f[0] for f in rounds[f"CartPole, PPO: {name}"]) for name in ("ppo.py", "SB3"))
    assert f"{ours / theirs:.2f} x SB3 before ({ours:,.0f} and {theirs:,.0f} steps/s)" in " ".join(PAGES.split())
    (updates,) = [v for k, v in json.loads((results / "speed_dreamer.json").read_text()).items() if "gradient" in k]
    for name, rounds in (measured | updates).items():
        group, form = name.split(":")[0], "{:.2f}" if name in updates else "{:,.0f}"
        speeds = [figures[0] for figures in rounds]
        middle, low, high = map(form.format, (statistics.median(speeds), min(speeds), max(speeds)))
        row = f"| {name} | {middle} | {low} - {high} | "
        mine = [rows for other, rows in (measured | updates).items() if other.startswith(group) and other[-3:] == ".py"]
        if name[-3:] != ".py":
            row += f"{statistics.median(figures[0] for figures in mine[0]) / statistics.median(speeds):.2f} x"
        rest = [statistics.median(column) for column in list(zip(*rounds, strict=True))[1:]]  # memory in GB; start in s
        forms = ("{:.1f}", "{:.0f}") if name in updates else ("{:.1f}",)
        cells = [form.format(figure) if figure else "" for form, figure in zip(forms, rest, strict=True)]
        (line,) = [line for line in README.splitlines() if line.startswith(row)]
        assert [cell.strip() for cell in line.split("|")][-1 - len(cells) : -1] == cells, (line, cells)


def test_the_gpu_speeds_of_the_readme_are_what_was_measured():
    figures = json.loads((ROOT / "benchmark" / "results" / "speed_gpu.json").read_text())
    for name, rounds in figures["gradient steps/s, GB, seconds to start; one list per round"].items():
        (speeds, memory, start), form = zip(*rounds, strict=True), "| {} | {:.1f} | {:.1f} - {:.1f} | {:.1f} | {:.0f} |"
        row = form.format(name, statistics.median(speeds), min(speeds), max(speeds), memory[0], start[0])
        assert README.count(row) == 1, row


def listed(figures):
    return ", ".join(figures[:-1]) + " and " + figures[-1]


def first_as_far(rows, mean):
    """The episode with which the mean x of the last 100 did."""
    episodes = [row for row in rows if "charts/x_pos" in row]
    ends = range(100, len(episodes) + 1)
    far = (i for i in ends if statistics.mean(e["charts/x_pos"] for e in episodes[i - 100 : i]) >= mean)
    return episodes[next(far) - 1]


def first_with_flags(rows, count):
    """The episode with which so many of the last 100 had reached the flag."""
    episodes = [row for row in rows if "charts/flag" in row]
    flags = [episode["charts/flag"] for episode in episodes]
    return next(e for i, e in enumerate(episodes) if sum(flags[max(0, i - 99) : i + 1]) >= count)


def test_figures_in_the_prose_are_what_was_recorded():
    sys.path.append(str(ROOT / "benchmark"))
    import record

    def run(name):
        rows = record.load(record.RESULTS / f"SuperMarioBros-1-1-v0__{name}")[1]
        return [row for row in rows if "charts/x_pos" in row], rows

    def x(name, step):  # over the last 100 episodes
        return round(statistics.mean([e["charts/x_pos"] for e in run(name)[0] if e["global_step"] <= step][-100:]))

    def came_as_far(name, mean):
        return first_as_far(run(name)[1], mean)

    def with_flags(name, count):
        return first_with_flags(run(name)[1], count)

    prose = " ".join(PAGES.split())
    first, halves, often = ([with_flags(f"ppo__{seed}", count) for seed in "12"] for count in (1, 50, 95))
    steps, minutes = ([[e[key] for e in some] for some in (first, often)] for key in ("global_step", "time"))
    minutes = [[f"{seconds / 60:.0f}" for seconds in some] for some in minutes]
    text = f"The first flag came after {steps[0][0] / 1e3:.0f} and {steps[0][1] / 1e3:.0f} thousand steps "
    text += (
        f"({minutes[0][0]} and {minutes[0][1]} minutes), 95 flags in 100 episodes after {steps[1][0] / 1e6:.2f} and "
    )
    text += f"{steps[1][1] / 1e6:.2f} million ({minutes[1][0]} and {minutes[1][1]} minutes)."

    def trial(name):  # flags of the last 100 episodes, of all, and the mean x
        flags = [episode["charts/flag"] for episode in run(f"ppo__{name}")[0]]
        return f"{x(f'ppo__{name}', 1e9):,}", sum(flags[-100:]), sum(flags)

    planned, *slower = (trial(name) for name in ("1__300k", *(f"{s}__{n}M_lr2.5e-4" for n in "21" for s in "12")))
    faster, fastest = (
        list(zip(*(trial(f"{seed}__300k_lr{size}") for seed in "12"), strict=True)) for size in ("5e-4", "1e-3")
    )
    soon = [with_flags(f"ppo__{seed}__300k_lr1e-3", 50)["global_step"] for seed in "12"]
    later, latest = (
        [with_flags(f"ppo__{seed}__2M_lr2.5e-4", count)["global_step"] for seed in "12"] for count in (50, 95)
    )
    fell = [[row for row in run(f"ppo__{seed}")[1] if row.get("eval/flag_rate", 1) < 0.95][-1] for seed in "12"]
    fell = [(f"{row['eval/flag_rate'] * 100:.0f} %", f"step {row['global_step']:,}") for row in fell]
    critics = [run(f"actor_critic__{seed}") for seed in "12"]
    entropy = [
        {row["global_step"]: row["losses/entropy"] for row in rows if "losses/entropy" in row} for _, rows in critics
    ]
    froze = [sum(episode["charts/x_pos"] < 330 for episode in episodes[-100:]) for episodes, _ in critics]
    dreamer, rows = run("dreamerv3__1__8x32_stopped")
    stopped, minutes = rows[-1]["global_step"], rows[-1]["time"] / 60
    reached = statistics.mean(episode["charts/x_pos"] for episode in dreamer[-100:])
    flags = [episode["global_step"] for episode in dreamer if episode["charts/flag"]]
    as_far = [came_as_far(f"ppo__{seed}", reached) for seed in "12"]
    more = [f"{episode['global_step'] / dreamer[-1]['global_step']:.1f}" for episode in as_far]
    rows_of_first = rows
    earlier, rows = run("dreamerv3__1__8x32_earlier_stopped")
    second, second_rows = run("dreamerv3__2__8x32_stopped")
    came = statistics.mean(episode["charts/x_pos"] for episode in second[-100:])
    second_flags = [episode["global_step"] for episode in second if episode["charts/flag"]]
    halted = second_rows[-1]["global_step"]
    as_well = [came_as_far(f"ppo__{seed}", came)["global_step"] for seed in "12"]
    ends = range(100, len(second) + 1)
    best, end = max((statistics.mean(e["charts/x_pos"] for e in second[i - 100 : i]), i) for i in ends)
    top, flagged_then = second[end - 1], sum(episode["charts/flag"] for episode in second[end - 100 : end])
    as_high = [came_as_far(f"ppo__{seed}", best)["global_step"] for seed in "12"]
    for seed, step in zip("12", as_well, strict=True):  # "PPO's seeds had more"
        assert sum(e["charts/flag"] for e in run(f"ppo__{seed}")[0] if e["global_step"] <= step) > len(second_flags)
    died = [sum(low <= e["charts/x_pos"] < high for e in second[-100:]) for low, high in ((1790, 1800), (2010, 2030))]
    frozen, frozen_rows = run("dreamerv3__1__gamma0.9_stopped")
    frozen_at = frozen_rows[-1]["global_step"]
    then = [
        [row for row in rows if "losses/entropy" in row and row["global_step"] <= frozen_at][-1]
        for rows in (frozen_rows, rows_of_first, second_rows)
    ]
    undecided, scale = ([row[f"losses/{name}"] for row in then] for name in ("entropy", "return_scale"))
    nearer = run("dreamerv3__1__gamma0.9_entropy_stopped")[1][-1]["global_step"]
    for step in (3e4, 4e4, 5e4, 7e4):  # "ahead of both seeds", then "seed 2 passes it"
        names = "1__gamma0.9_entropy_stopped", "1__8x32_stopped", "2__8x32_stopped"
        near, *seeds = (x(f"dreamerv3__{name}", step) for name in names)
        assert near > max(seeds) if step < 6e4 else near < seeds[1]
    at_goomba = sum(episode["charts/x_pos"] < 330 for episode in earlier[-100:])
    flagged = [
        sum(episode["charts/flag"] for seed in "12" for episode in run(f"{name}__{seed}")[0])
        for name in ("reinforce", "reinforce_baseline")
    ]
    spreads = json.loads((ROOT / "benchmark/results/variance.json").read_text()).values()
    bare, fair = ([row[name] / row["with"] for row in spreads] for name in ("without", "batch mean"))
    chance = [episode["x_pos"] for episode in json.loads((ROOT / "benchmark/results/chance.json").read_text())]
    error = statistics.stdev(chance) / len(chance) ** 0.5
    clipped = [
        statistics.mean(row["losses/clipfrac"] for row in run(f"ppo__{seed}")[1] if "losses/clipfrac" in row) * 100
        for seed in "12"
    ]
    promised = [row for row in run("trpo__1")[1] if "losses/kl" in row]
    kept = [row["losses/improvement"] / row["losses/expected_improvement"] for row in promised]
    more_replay, metrics = run("dreamerv3__1__ratio256_stopped")
    came_to = statistics.mean(episode["charts/x_pos"] for episode in more_replay[-100:])
    end, own = metrics[-1]["global_step"], metrics[-1]["time"] / 60
    slow, *others = (came_as_far(name, came_to) for name in ("dreamerv3__1__8x32_stopped", "ppo__1", "ppo__2"))
    times = [f"{episode['global_step'] / end:.1f} times" for episode in (slow, *others)]
    times[1] = times[1].removesuffix(" times")
    minutes_of = [f"{episode['time'] / 60:.0f}" for episode in (slow, *others)]
    assert minutes_of[1] == minutes_of[2]
    in_pit = sum(1100 <= episode["charts/x_pos"] <= 1140 for episode in more_replay[-100:])
    names = ("1__300k", "2__300k", "1__300k_1epoch", "1__300k_no_clip", "1__300k_no_norm_reward", "1__300k_gamma0.99")
    alone = {name: run(f"ppo__{name}")[1] for name in names}

    def between(name, key, begin, end):
        return statistics.mean(
            row[f"losses/{key}"] for row in alone[name] if "losses/loss" in row and begin <= row["global_step"] < end
        )

    moved = [between(name, "approx_kl", 100_000, 130_000) for name in names]
    errors = [between(name, "value_loss", 270_001, 300_000) for name in ("1__300k", "1__300k_no_norm_reward")]
    crippled = [x(f"ppo__{name}", 1e9) for name in names[2:]]
    for sentence in (
        text,
        f"without any one of them Mario comes to {min(crippled)} to {max(crippled):,}, where random buttons come to",
        f"the critic's loss is {round(errors[1] / errors[0], -2):,.0f} times as large",
        f"(KL divergence {moved[2]:.4f}, not {moved[0]:.4f} and {moved[1]:.4f}, between steps 100,000 and 130,000).",
        f"without it the KL divergence was {moved[3]:.2f} there.",
        "(planned for 300,000 steps, its seeds ended at a mean x of {} and {}, with {} and {} flags)".format(
            *fastest[0], *fastest[1]
        ),
        f"mean x {planned[0]}, {planned[1]} flags in the last 100 episodes, {planned[2]} in all |",
        "mean x {} and {}, {} and {} flags in the last 100 episodes, {} and {} in all: better".format(*sum(faster, ())),
        "1e-3: mean x {} and {}, {} and {} flags in the last 100 episodes, {} and {} in all;".format(*sum(fastest, ())),
        f"after {soon[0]:,} and {soon[1]:,} steps, {fastest[1][0]} and {fastest[1][1]} of the last 100.",
        f"reached the flag after {later[0]:,} and {later[1]:,} steps (now {halves[0]['global_step']:,} and "
        f"{halves[1]['global_step']:,}), 95 of 100 after {latest[0] / 1e6:.2f} and {latest[1] / 1e6:.2f} million, "
        f"and of the last 100 episodes {slower[0][1]} and {slower[1][1]}. Planned for a million steps, as now, the "
        "last 100 had "
        f"{slower[2][1]} and {slower[3][1]} flags,",
        f"{len(chance)} episodes) come to a mean x of {statistics.mean(chance):.0f}, with a "
        f"standard error of {error:.0f}.",
        f"V makes the variance {min(bare):.0f} to {max(bare):.0f} times smaller",
        f"V is worth a factor of {', '.join(f'{factor:.1f}' for factor in fair[:-1])} and {fair[-1]:.1f} (",
        f"in 300,000, where random buttons come to {statistics.mean(chance):.0f}.",
        f"little above what random buttons give ({statistics.mean(chance):.0f})",
        f"On Mario {clipped[0]:.0f} and {clipped[1]:.0f} % of all ratios (two seeds) were outside.",
        f"It takes {steps[1][0] / 1e6:.2f} (seed 1) and {steps[1][1] / 1e6:.2f} million steps (seed 2) of real play",
        f"otherwise with the same flags, those of the larger batches, stopped at step {end:,}:",
        f"The mean x of {came_to:,.0f} that it had reached in the end took seed 1 with ratio 64 {times[0]} as many "
        f"steps, but no more minutes ({minutes_of[0]}, against {own:.0f}), and PPO {times[1]} and {times[2]} as many, "
        f"in {minutes_of[1]} minutes each.",
        f"In {in_pit} of its last 100 episodes",
        f"a mean x of {x('reinforce__1', 1e5)} and {x('reinforce__2', 1e5)} in 100,000 steps, "
        f"and of {x('reinforce__1', 3e5)} and {x('reinforce__2', 3e5)} in 300,000",
        f"x = {x('reinforce_baseline__1', 3e5)} and {x('reinforce_baseline__2', 3e5)} with it, "
        f"{x('reinforce__1', 3e5)} and {x('reinforce__2', 3e5)} without, and {flagged[1]} flags against {flagged[0]};",
        f"the baseline holds out ({x('reinforce_baseline__1__lr1e-3', 3e5)})",
        f"the first goomba (x = {x('reinforce__1__lr1e-3', 3e5)})",
        f"a mean x of {x('a2c__1__300k_lr3e-3', 3e5)}, and of {x('a2c__1__300k_lr3e-3_32steps', 3e5)} with rollouts of "
        f"32 steps as well, against {x('a2c__1', 3e5)} and {x('a2c__2', 3e5)} in the table.",
        f"actor-critic had {x('actor_critic__1', 12e4)} and {x('actor_critic__2', 12e4)} after 120,000 steps",
        f"it falls to {x('actor_critic__1', 3e5)} and {x('actor_critic__2', 3e5)}: {froze[0]} and {froze[1]} of the "
        "last 100 episodes end at the first goomba.",
        f"The median update brought {statistics.median(kept):.0%} of".replace("%", " %"),
        f"stopped at step {stopped:,}, with a mean x of {reached:,.0f}, and at step {halted:,}, with {came:,.0f}, "
        f"after {best:,.0f} at step {top['global_step']:,}. PPO needed {more[0]} and {more[1]} times as many steps as "
        f"seed 1, {as_high[0] / top['global_step']:.1f} and {as_high[1] / top['global_step']:.1f} times as many as "
        f"seed 2 at its best, {as_well[0] / halted:.1f} and {as_well[1] / halted:.1f} times as many as when that was "
        "stopped.",
        f"it needs between {as_well[1] / halted:.1f} and {more[0]} times as many:",
        f"Where seed 1 was stopped, at step {stopped:,}, the mean x of the last 100 episodes was {reached:,.0f}, and "
        f"one episode had reached the flag, at step {flags[0]:,}.",
        f"as far after {as_far[0]['global_step']:,} and {as_far[1]['global_step']:,} steps, but in "
        f"{as_far[0]['time'] / 60:.0f} and {as_far[1]['time'] / 60:.0f} minutes: DreamerV3 had taken {minutes:.0f}, on",
        f"was ahead of PPO at step {top['global_step']:,} and level with it when it was stopped, at step {halted:,}: "
        f"the mean x of its last 100 episodes rose to {best:,.0f}, with {flagged_then} flags, after "
        f"{top['time'] / 60:.0f} minutes, mostly on one core, and was {came:,.0f}, with "
        f"{sum(e['charts/flag'] for e in second[-100:]):.0f} flags, after {second_rows[-1]['time'] / 60:.0f}. PPO's "
        f"seeds came as far as that peak after {as_high[0]:,} and {as_high[1]:,} steps, as far as the end after "
        f"{as_well[0]:,} and {as_well[1]:,}. Seed 2's first flag came at step {second_flags[0]:,}, and "
        f"{len(second_flags)} in all; PPO's seeds had more by the time they were level. {sum(died)} of the last 100 "
        f"episodes ended in two places, {died[0]} at x = 1,790 to 1,799 and {died[1]} at 2,010 to 2,029:",
        f"PPO's seeds had it in half of their episodes after {halves[0]['global_step']:,} and "
        f"{halves[1]['global_step']:,} steps.",
        f"when the run was stopped, at step {frozen_at:,}: its entropy was {undecided[0]:.2f} (with 0.997 "
        f"{undecided[1]:.2f} and {undecided[2]:.2f}), and "
        f"{sum(episode['charts/x_pos'] < 330 for episode in frozen[-100:])} of its last 100 episodes",
        f"S in (11) was {scale[0]:.0f}, not {scale[1]:.0f} or {scale[2]:.0f},",
        f"seed 1, on one core, stopped at step {nearer:,}:",
        f"was at {x('dreamerv3__1__8x32_earlier_stopped', 1e9)} when it was stopped at step "
        f"{rows[-1]['global_step']:,}, where {at_goomba} of the last 100 episodes ended at the first goomba",
        f"came to a mean x of {x('dreamerv3__1__12m_stopped', 4e4)}.",
        f"for the last time at {fell[0][1]} for seed 1 ({fell[0][0]}), at {fell[1][1]} for seed 2 ({fell[1][0]}).",
        f"as its policy froze (entropy {entropy[0][120000]:.2f} and {entropy[1][120000]:.2f}, in the end "
        f"{entropy[0][300000]:.2f} and {entropy[1][300000]:.2f})",
    ):
        assert sentence in prose, sentence


def test_figures_beside_the_tables_are_what_was_recorded():
    sys.path.append(str(ROOT / "benchmark"))
    import record

    def column(run, key):
        return [row[key] for row in record.load(record.RESULTS / run)[1] if key in row]

    def evaluated(run):
        return [f"{mean:.0f}" for mean in column(run, "eval/return_mean")]

    lander = [f"LunarLander-v3__a2c__{seed}" for seed in "123"]
    landed = sum(paid >= 200 for run in lander for paid in column(run, "charts/episodic_return")[-100:])
    hovered = sum(length == 1000 for run in lander for length in column(run, "charts/episodic_length")[-100:])
    ended = [evaluated(f"{run}__5steps")[-1] for run in lander]
    tens = {seed: ", ".join(evaluated(f"CartPole-v1__dreamerv3__{seed}__observations_x10")) for seed in "13"}
    ones = {seed: ", ".join(evaluated(f"CartPole-v1__dreamerv3__{seed}")) for seed in "13"}
    small = [evaluated(f"CartPole-v1__dreamerv3__{seed}__4x16") for seed in "12"]
    small = [f"seed {n + 1}: {listed(means)}" for n, means in enumerate(small)]
    control = record.load(record.RESULTS / "dmc-cartpole-swingup-v0__dreamerv3__1__lr1.6e-4_stopped")[1]
    late = [row["charts/episodic_return"] for row in control if "charts/episodic_return" in row]
    late = late[-sum(2 * row["global_step"] > 30_000 for row in control if "charts/episodic_return" in row) :]
    second = record.load(record.RESULTS / "dmc-cartpole-swingup-v0__dreamerv3__2__lr1.6e-4")[1]
    published = json.loads((record.RESULTS / "published.json").read_text())
    for frames, *seeds in zip(published["frames"], *published["returns"].values(), strict=True):
        assert min(seeds) < record.control_return(second, frames) < max(seeds)  # "inside it in every row"
    (swung,) = [row for row in second if "eval/return_mean" in row]
    assert 140 < hovered < 170  # "about half"
    assert (
        column("Pendulum-v1__dreamerv3__1", "eval/return_mean")[1] > -200 and len(late) == 8
    )  # the second, after 8,000
    prose = " ".join(PAGES.split())
    for sentence in (
        f"about half of its last episodes hover until time is up, {landed} of 300 return 200 or more.",
        f"100 episodes, three seeds | {ended[0]}, {ended[1]} and {ended[2]};",
        f"seed 3 gave {tens['3']} instead of {ones['3']}; seed 1 gave {tens['1']} instead of {ones['1']}.",
        f"as by default | {'; '.join(small)} over 100 episodes after 5, 10, 15 and 20 thousand steps,",
        f"({statistics.mean(late):.0f} over its eight episodes after 30,000)",
        f"its last policy returned {swung['eval/return_mean']:.0f} ± {swung['eval/return_std']:.0f} over 20 episodes.",
    ):
        assert sentence in prose, sentence


def test_what_is_said_of_the_size_of_batches_is_what_was_recorded():
    sys.path.append(str(ROOT / "benchmark"))
    import record

    def rows_of(name):  # of a run's folder
        return record.load(record.RESULTS / name)[1]

    def loss(name, step, key="image"):
        return record.latest(rows_of(name), f"losses/{key}", step)

    def far(rows, step=1e9):
        return record.latest(rows, "charts/x_pos", step, 100)

    mario = "SuperMarioBros-1-1-v0__dreamerv3__"
    runs = [rows_of(f"{mario}{seed}") for seed in (1, 2)]
    x, flags = [far(rows) for rows in runs], [sum(row.get("charts/flag", 0) for row in rows) for rows in runs]
    first, second = (f"{mario}{seed}__8x32_stopped" for seed in (1, 2))
    names = [f"SuperMarioBros-1-1-v0__ppo__{seed}{note}" for note in ("", "__2M_lr2.5e-4") for seed in "12"]
    others = [[first_as_far(rows_of(name), mean) for name in [*names, second]] for mean in x]
    times = [[f"{other['global_step'] / 100_000:.1f}" for other in some] for some in others]
    minutes = [[f"{other['time'] / 60:.0f}" for other in some] for some in others]
    own = [f"{[row for row in rows if 'charts/x_pos' in row][-1]['time'] / 60:.0f}" for rows in runs]
    for mean in x:  # "never came as far"
        with pytest.raises(StopIteration):
            first_as_far(rows_of(first), mean)
    evaluated = [[f"{row['eval/x_pos_mean']:,.0f}" for row in rows if "eval/x_pos_mean" in row] for rows in runs]
    reached = [[f"{row['eval/flag_mean'] * 20:.0f}" for row in rows if "eval/flag_mean" in row] for rows in runs]
    faster, undecided, both = (
        f"{mario}1__{name}_stopped" for name in ("lr5e-4", "lr1e-3_entropy", "4x16_lr1e-3_entropy")
    )
    ball = "catch-Catch-v0__dreamerv3__1__{}lr1e-3_stopped"
    mean = [f"{far(rows_of(both), step):.0f}" for step in (10_000, 15_000)]
    printed = json.loads((record.RESULTS / "evaluations.json").read_text())["--eval-episodes 100 --seed 123"]
    lines = [printed[f"{mario}{seed}/{file}.pt"] for file in ("checkpoint", "best") for seed in (1, 2)]
    played = [[int(n) for n in re.search(r"flag (\d+)%, x (\d+) \+- (\d+)", line).groups()] for line in lines]
    far_and_flags = [(*one[1:], *two[1:], one[0], two[0]) for one, two in (played[:2], played[2:])]
    prose = " ".join(PAGES.split())
    for sentence in (
        f"mean x of the last 100 episodes came to {x[0]:,.0f} and {x[1]:,.0f} in 100,000 steps (two seeds): PPO's two "
        f"seeds needed **{times[0][0]} and {times[0][1]} times** as many steps to come as far as DreamerV3's seed 1, "
        f"**{times[1][0]} and {times[1][1]} times** as many to come as far as its seed 2.",
        f"needed {times[0][2]} and {times[0][3]}, {times[1][2]} and {times[1][3]} times as many as the default flags,",
        f"took it {own[0]} and {own[1]} minutes on one core each, PPO {minutes[0][0]} and {minutes[0][1]} for that of "
        f"seed 1, {minutes[1][0]} and {minutes[1][1]} for that of seed 2. It hardly ever reached the flag: {flags[0]} "
        f"and {flags[1]} times in training, and the last checkpoints in {played[0][0]} and {played[1][0]} of 100",
        f"1 never came, seed 2 after {times[0][4]} (as far as their seed 1) and {times[1][4]} times as many (their",
        "seed 1 x {}, seed 2 {}; flags {}, {}.".format(*map(listed, evaluated + reached)),
        "mean x {:,} ± {} and {:,} ± {}, {} and {} flags; the best ones".format(*far_and_flags[0]),
        "; the best ones, of steps 100,006 and 80,003, {:,} ± {} and {:,} ± {}, {} and {} flags.".format(
            *far_and_flags[1]
        ),
        f"seed 1's is {record.latest(runs[0], 'losses/image', 5000):.1f} after 4,700 updates (8 x 32: "
        f"{loss(first, 20_000):.1f} after 4,800), {record.latest(runs[0], 'losses/image', 10_000):.1f} after 9,700 "
        f"({loss(first, 40_000):.1f} after 9,800).",
        f"is {loss(both, 10_000):.1f} after 10,000 steps of Mario with batches of 4 x 16, "
        f"{loss(undecided, 10_000):.1f} with 8 x 32,",
        f"image loss {loss(faster, 9000):.1f} after 9,000 steps ({loss(first, 9000):.1f} and "
        f"{loss(second, 9000):.1f} with 2e-4), entropy {loss(faster, 9000, 'entropy'):.2f} "
        f"({loss(first, 9000, 'entropy'):.2f} and {loss(second, 9000, 'entropy'):.2f})",
        f"image loss {loss(undecided, 10_000):.1f} after 10,000 steps ({loss(first, 10_000):.1f} and "
        f"{loss(second, 10_000):.1f}), entropy {loss(undecided, 10_000, 'entropy'):.2f}",
        f"image loss {loss(both, 10_000):.1f} and {loss(both, 15_000):.1f} after 10,000 and 15,000 steps, mean x "
        f"{mean[0]} and {mean[1]};",
        f"image loss {loss(ball.format(''), 6000):.2f} after 6,000 steps with batches of 8 x 32, "
        f"{loss(ball.format('4x16_'), 3000):.2f} and {loss(ball.format('4x16_'), 4000):.2f} after 3,000 and 4,000 with "
        "4 x 16",
    ):
        assert sentence in prose, sentence


def test_what_is_said_of_training_on_a_gpu_is_what_was_recorded():
    sys.path.append(str(ROOT / "benchmark"))
    import record

    mario, prose = "SuperMarioBros-1-1-v0__", " ".join(PAGES.split())
    names = "dreamerv3__1__12m_gpu_stopped", "ppo__1__300k_gpu", "ppo__1", "ppo__2", "dreamerv3__1"
    dream, beside, *plays, small = (record.load(record.RESULTS / f"{mario}{name}")[1] for name in names)
    cpu = [record.load(record.RESULTS / f"{mario}ppo__{seed}__300k_lr1e-3")[1] for seed in "12"]

    def flags(rows):  # the episodes that reached it, and how many of the last 100 did
        episodes = [row for row in rows if "charts/flag" in row]
        return [row for row in episodes if row["charts/flag"]], sum(row["charts/flag"] for row in episodes[-100:])

    def rate(rows, begin, end):  # steps per second between updates
        first, *_, last = (row for row in rows if "losses/loss" in row and begin <= row["global_step"] <= end)
        return (last["global_step"] - first["global_step"]) / (last["time"] - first["time"])

    end = [row for row in dream if "charts/x_pos" in row][-1]
    begun, *_, updated = (row for row in dream if "losses/image" in row)
    x, late = (record.latest(dream, "charts/x_pos", 1e9, count) for count in (100, 50))
    others = [first_as_far(rows, x) for rows in [*plays, beside]]
    times = [f"{other['global_step'] / end['global_step']:.1f}" for other in others]
    minutes = [other["time"] / 60 for other in others]
    printed = json.loads((record.RESULTS / "evaluations.json").read_text())["--eval-episodes 100 --seed 123"]
    line = printed["SuperMarioBros-1-1-v0__dreamerv3__1__12m_gpu_stopped/checkpoint.pt"]
    reached, far, spread = map(int, re.search(r"flag (\d+)%, x (\d+) \+- (\d+)", line).groups())
    played = [first_as_far(rows, far)["global_step"] / 34_850 for rows in plays]
    half = first_with_flags(beside, 50)
    images = record.latest(dream, "losses/image", 1e9), record.latest(small, "losses/image", end["global_step"])
    assert beside[-1]["eval/episodes"] == 20 and len(flags(dream)[0]) == 3
    for sentence in (
        f"the mean x of its last 100 episodes was {x:,.0f} at step {end['global_step']:,}: PPO's two seeds needed "
        f"**{times[0]} and {times[1]} times** as many steps for that.",
        f"{end['time'] / 60:.1f} minutes, {begun['time'] / 60:.1f} of them to compile and to play the first 1,000 "
        f"steps, then {rate(dream, 1000, 1e9):.0f} updates/s.",
        f"the image loss came to {images[0]:.1f}, where that of the smallest was {images[1]:.1f} after about as many",
        f"The first of three flags came at step {flags(dream)[0][0]['global_step']:,}, the mean x of the last 50 "
        f"episodes was {late:,.0f}, and the last checkpoint reached the flag in {reached} of 100 further episodes, "
        f"with a mean x of {far:,}, which PPO's seeds had in training after {played[0]:.1f} and {played[1]:.1f} times "
        "as many steps.",
        f"PPO, beside it on the same machine, took {minutes[2]:.1f} for a mean x of {x:,.0f}, and after 300,000 steps "
        f"and {beside[-1]['time'] / 60:.1f} minutes {flags(beside)[1]} of its last 100 episodes had reached the flag.",
        f"The mean x of {x:,.0f} took PPO's recorded seeds {times[0]} and {times[1]} times as many steps, in "
        f"{minutes[0]:.0f} and {minutes[1]:.0f} minutes, and the one beside it {times[2]} times as many, in "
        f"{minutes[2]:.1f}.",
        f"100 further episodes (`--seed 123`): {reached} flags, mean x {far:,} ± {spread}. Model,",
        f"Between steps {begun['global_step']:,} and {updated['global_step']:,} it made {rate(dream, 0, 1e9):.1f} "
        "updates/s,",
        f"took {beside[-1]['time'] / 60:.1f} minutes, {rate(beside, 4000, 150_000):.0f} steps/s in the first half, "
        f"{rate(beside, 200_000, 3e5):.0f} in the last third. Half of the episodes reached the flag after "
        f"{half['global_step']:,} steps and {half['time'] / 60:.1f} minutes, {flags(beside)[1]} of the last 100, with "
        f"a mean x of {record.latest(beside, 'charts/x_pos', 1e9, 100):,.0f}; the last policy "
        f"{beside[-1]['eval/flag_rate'] * 20:.0f} of 20 (evaluated at the end). The two runs of 300,000 steps on a CPU "
        f"with this step size had {flags(cpu[0])[1]} and {flags(cpu[1])[1]}.",
    ):
        assert sentence in prose, sentence
    doc = " ".join(__import__("dreamerv3").__doc__.split())
    text = f"after {end['time'] / 60:.1f} minutes: mean x = {x:,.0f} over the last 100 episodes, 3 flags in all; the "
    text += f"last checkpoint reached the flag in {reached} of 100 episodes. PPO needs {times[0]} and {times[1]} times"
    assert text in doc, text


def test_figures_in_the_docstrings_are_what_was_recorded():
    sys.path.append(str(ROOT / "benchmark"))
    import record

    def once(figures):
        return figures[0] if len(set(figures)) == 1 else listed(figures)

    for name in SCRIPTS[:-1]:
        doc = " ".join(__import__(name).__doc__.split())
        for env in ("CartPole-v1", "Acrobot-v1", "LunarLander-v3"):
            runs = sorted(path for path in record.RESULTS.glob(f"{env}__{name}__*") if path.name.count("__") == 2)
            rows = [[row for row in record.load(run)[1] if "eval/return_mean" in row][-1] for run in runs]
            if runs and env in doc:
                assert {row["eval/episodes"] for row in rows} == {100}
                returns = once([f"{row['eval/return_mean']:.0f}" for row in rows])
                said = rf"{env} (returns )?{returns}[ ,].*for seeds 1 to {len(runs)}"
                assert re.search(said, doc), (name, said)
        mario = [record.load(run)[1] for run in sorted(record.RESULTS.glob(f"SuperMarioBros-1-1-v0__{name}__?"))]
        if name == "ppo":
            flags = [sum([row["charts/flag"] for row in rows if "charts/flag" in row][-100:]) for rows in mario]
            text = (
                f"a million steps, seeds 1 and 2: {flags[0]} and {flags[1]} of the last 100 training episodes reached"
            )
            assert text in doc, text
            continue
        episodes = [[row for row in rows if "charts/flag" in row and row["global_step"] <= 3e5] for rows in mario]
        x = once([f"{statistics.mean(row['charts/x_pos'] for row in run[-100:]):,.0f}" for run in episodes])
        flags = once([str(sum(row["charts/flag"] for row in run)) for run in episodes])
        seeds = "seed 1" if len(mario) == 1 else "seeds 1 and 2"
        text = f"Super Mario Bros 1-1, {seeds}, 300,000 steps: mean x = {x} over the last 100 episodes, {flags} flags"
        assert f"{text} in all" in doc, (name, text)

    runs = (f"SuperMarioBros-1-1-v0__{name}__{seed}" for name in ("dreamerv3", "ppo") for seed in "12")
    *dreams, first, second = (record.load(record.RESULTS / run)[1] for run in runs)
    episodes = [[row for row in rows if "charts/flag" in row] for rows in dreams]
    x = [statistics.mean(row["charts/x_pos"] for row in run[-100:]) for run in episodes]
    minutes = [f"{run[-1]['time'] / 60:.0f}" for run in episodes]
    flags = [sum(row["charts/flag"] for row in run) for run in episodes]
    times = [f"{first_as_far(rows, mean)['global_step'] / 1e5:.1f}" for mean in x for rows in (first, second)]
    text = f"100,000 steps, seeds 1 and 2 ({minutes[0]} and {minutes[1]} minutes, one core each): mean x = {x[0]:,.0f} "
    text += f"and {x[1]:,.0f} over the last 100 episodes, {flags[0]} and {flags[1]} flags in all. PPO needs {times[0]} "
    text += f"and {times[1]} times as many steps to come as far as seed 1, {times[2]} and {times[3]} times as many as "
    doc = " ".join(__import__("dreamerv3").__doc__.split())
    assert text in doc, text


def test_returns_of_sb3_on_lunar_lander_are_what_was_recorded():
    rows = json.loads((ROOT / "benchmark/results/sb3_lunarlander.json").read_text())["rows"]
    assert [row[0] for row in rows] == [1, 2, 3]
    drawn, likeliest = ([f"{row[column]:.0f}" for row in rows] for column in (1, 3))
    text = "seeds 1 to 3, it came to {}, {} and {} over 100 episodes (to {}, {} and {} with the likeliest action"
    assert text.format(*drawn, *likeliest) in " ".join(README.split())


def test_returns_of_dreamer_beside_sheeprl_are_what_was_recorded():
    sys.path.append(str(ROOT / "benchmark"))
    import record

    theirs = json.loads((record.RESULTS / "sheeprl_cartpole.json").read_text())["episodes, [step, return]"]
    rows = {"sheeprl, seed 3": theirs}
    for seed in "123":
        metrics = record.load(record.RESULTS / f"CartPole-v1__dreamerv3__{seed}")[1]
        episodes = [[row["global_step"], row.get("charts/episodic_return")] for row in metrics]
        rows[f"here, seed {seed}"] = [episode for episode in episodes if episode[1] is not None]
        evaluations = ", ".join(f"{row['eval/return_mean']:.0f}" for row in metrics if "eval/return_mean" in row)
        assert f"seed {seed}: {evaluations}" in " ".join((record.RESULTS / "README.md").read_text().split())
    for name, episodes in rows.items():
        means = [
            statistics.mean(r for step, r in episodes if end - 2000 < step <= end) for end in range(2000, 14001, 2000)
        ]
        assert f"| {name} | {' | '.join(f'{mean:.0f}' for mean in means)} |" in PAGES, name


def test_what_is_said_of_catch_is_what_was_recorded():
    sys.path.append(str(ROOT / "benchmark"))
    import record

    prose, said = " ".join(PAGES.split()), {}
    for name in ("dreamerv3__1__stopped", "dreamerv3__2", "ppo__1", "ppo__2", "dreamerv3__1__12m_stopped"):
        said[name] = record.load(record.RESULTS / f"catch-Catch-v0__{name}")[1]
    dreams, plays = list(said.values())[:2], list(said.values())[2:4]
    found = [next(row["global_step"] for row in rows if row.get("losses/image", 9) < 7.7) for rows in dreams]
    found = [f"{round((step - 512) / 4, -2):,.0f}" for step in found]  # the first update comes after 512 steps
    assert f"Seed 1 found that after {found[0]} updates, seed 2 after {found[1]}." in prose
    perfect, often = [], []
    for rows in dreams + plays:
        evaluations = [row for row in rows if "eval/return_mean" in row]
        perfect.append(next(row for row in evaluations if row["eval/return_mean"] == 1))
        often.append(next(row for row in evaluations if row["eval/return_mean"] >= 0.9)["global_step"])
    steps, minutes = ([row[key] for row in perfect] for key in ("global_step", "time"))
    minutes = [f"{seconds / 60:.0f}" for seconds in minutes]
    assert perfect[0]["eval/episodes"] == 100 and often[2] == often[3] and steps[2] == steps[3]
    sentence = (
        f"after {steps[0]:,} steps (seed 1) and {steps[1]:,} (seed 2) caught 100 of 100 balls. PPO's first to do so "
    )
    assert (
        sentence + f"came after {steps[2]:,} steps with both seeds, those of 0.9 and more after {often[2]:,}." in prose
    )
    sentence = (
        f"took {minutes[3]} and {minutes[2]} of them on one busy core, DreamerV3's {steps[0]:,} and {steps[1]:,} took "
    )
    assert sentence + f"{minutes[0]} and {minutes[1]}." in prose
    theirs = json.loads((record.RESULTS / "sheeprl_catch.json").read_text())["observation_loss"][-1]
    ours = [row["losses/image"] for row in dreams[0] if "losses/image" in row][3:5]
    large = [row["losses/image"] for row in said["dreamerv3__1__12m_stopped"] if "losses/image" in row][-1]
    assert (
        f"({theirs:.1f} after 4,500 steps; here {sum(ours) / 2:.1f}), size 12m here to {large:.1f} after 7,000."
        in prose
    )


SLOWER = "1__1M_lr2.5e-4/best", "1__1M_lr2.5e-4/checkpoint", "2__1M_lr2.5e-4/checkpoint"


def test_evaluations_of_the_readme_are_what_was_printed():
    prose = " ".join(PAGES.split())
    printed = json.loads((ROOT / "benchmark" / "results" / "evaluations.json").read_text())

    def figures(line):
        pattern = r"return (\S+) \+- ([\d.]+)(?:, flag (\d+)%, x (\d+) \+- (\d+))?"
        return [float(figure) for figure in re.search(pattern, line).groups(0)]

    hundred = {name: figures(line) for name, line in printed["--eval-episodes 100 --seed 123"].items()}
    files = [f"SuperMarioBros-1-1-v0__ppo__{s}/{file}.pt" for file in ("best", "checkpoint") for s in "12"]
    returns = [f"{hundred[file][0]:,.0f} ± {hundred[file][1]:.0f}" for file in files]
    flags = [f"{hundred[file][2]:.0f}" for file in files]
    sentence = f"reached the flag in {flags[0]} and {flags[1]}, the last `checkpoint.pt` in {flags[2]} and {flags[3]} "
    sentence += f"(returns of best.pt {returns[0]} and {returns[1]}, of the last one {returns[2]} and {returns[3]})"
    assert sentence in prose, sentence
    sentence = (
        f"the last checkpoints reached it in {flags[2]} and {flags[3]}, the best ones in {flags[0]} and {flags[1]}."
    )
    assert sentence in " ".join(__import__("ppo").__doc__.split()), sentence
    assert [hundred[f"CartPole-v1__dreamerv3__{seed}/best.pt"][0] for seed in "123"] == [500] * 3  # as chapter 7 says
    best, *last = (f"{hundred[f'SuperMarioBros-1-1-v0__ppo__{name}.pt'][2]:.0f}" for name in SLOWER)
    sentence = (
        f"reached it in {last[0]} each, the best one of seed 1, as chosen by 20 episodes at step 800,768, in {best}."
    )
    assert last[0] == last[1] and sentence in prose, sentence
    dreams = [
        hundred[f"SuperMarioBros-1-1-v0__dreamerv3__2__8x32_stopped/{file}.pt"][2:] for file in ("best", "checkpoint")
    ]
    dreams = [f"{reached:.0f} flags, mean x {x:,.0f} ± {spread:.0f}" for reached, x, spread in dreams]
    sentence = f"100 further episodes (`--seed 123`): {dreams[0]}; its last one {dreams[1]}."
    assert sentence in prose, sentence
    (flag,) = printed["--eval-episodes 1"].values()
    assert f"drawn from the policy: the flag, return {figures(flag)[0]:,.0f}." in prose
    for name, lines in printed["--eval-episodes 1, --seed 1 to 5"].items():
        low, _, median, _, high = sorted(figures(line)[0] for line in lines)
        script = name.split("__")[1]
        sentence = (
            f"`{script}.py` after 300,000 steps: return {median:,.0f}, the median of five episodes, which earned "
        )
        sentence += f"{low:,.0f} to {high:,.0f}"
        if script == "dreamerv3":
            sentence = f"return {median:,.0f}; the median of five episodes, which earned {low:,.0f} to {high:,.0f}."
        if low == high:
            sentence = (
                f"`{script}.py` after 300,000 steps: return {median:,.0f}, like each of the five episodes played."
            )
        assert sentence in prose, sentence


def test_the_code_of_a_chapter_stands_in_its_script():
    journey = README.partition("## The journey")[2].partition("\n## ")[0]
    chapters = re.split(r"\n### (\d) ", journey)[1:]
    assert chapters[::2] == [str(n) for n in range(1, 8)]
    for number, chapter in zip(chapters[::2], chapters[1::2], strict=True):
        source = (ROOT / f"{SCRIPTS[int(number) - 1]}.py").read_text()
        blocks = re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)
        assert blocks and all(block in source for block in blocks), number


def test_what_is_pasted_has_no_comment():
    """zsh, as on a Mac, takes what follows a # for arguments."""
    pasted = re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL)
    pasted += [line for name in SCRIPTS for line in re.findall(r"(?m)^    uv run .*", __import__(name).__doc__)]
    assert len(pasted) > 20 and not any("#" in text for text in pasted)


def test_every_equation_stands_in_the_readme_in_a_docstring_and_beside_the_code():
    assert "$$" not in PAGES  # GitHub's Markdown would take the backslashes out of it before they are read as TeX
    shown = "".join(re.findall(r"```math\n(.*?)\n```", README, re.DOTALL))
    for number in range(1, 12):
        assert f"tag{{{number}}}" in shown
        chapters = [__import__(name) for name in SCRIPTS]
        assert any(f"({number})" in script.__doc__ for script in chapters), number
        if number > 1:  # (1) is what all of them make large
            code = [(ROOT / f"{script.SCRIPT}.py").read_text().partition('"""\n\nimport')[2] for script in chapters]
            assert any(
                re.search(rf"quations? \({number}\)|\({number}\) to \(|to \({number}\)", text) for text in code
            ), number


def test_pictures_serve_light_and_dark_readers_and_are_small():
    shown = re.findall(r'srcset="(\S+)-dark.svg"><img src="(\S+)-light.svg" alt="([^"]+)"', README)
    assert len(shown) == len(re.findall("<picture>", README)) and all(dark == light for dark, light, _ in shown)
    for name, _, _ in shown:
        for mode in ("dark", "light"):
            assert (ROOT / f"{name}-{mode}.svg").stat().st_size < 300_000
    for path in (ROOT / "images").iterdir():
        assert path.stat().st_size < 2_000_000 and path.name.split("-")[0] in README


def test_ruff_finds_nothing():
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
