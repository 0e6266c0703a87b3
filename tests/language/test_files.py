"""Files: `use`, `set` and `--set`, what cannot be read, and several mistakes at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from graftc.diagnostics import Diagnostic, GraftError, Source
from graftc.language.check import check
from graftc.language.formatter import format_text
from graftc.language.parser import parse
from graftc.language.resolve import resolve
from graftc.language.resources import rules_folder
from graftc.language.rules import Rules, SiteMatch

RULE = "rule {name} {{\n    match   b = block in blocks {blocks}\n    skip    b\n}}\n"


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.graft"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "main.graft"


def mistakes(
    path: Path | Source, overrides: dict[str, str] | None = None
) -> tuple[Diagnostic, ...]:
    with pytest.raises(GraftError) as caught:
        check(path, overrides)
    return caught.value.diagnostics


def names(rules: Rules) -> list[str]:
    return [r.name for r in rules.rules]


def first_last(rules: Rules) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for rule in rules.rules:
        (match,) = rule.matches
        assert isinstance(match, SiteMatch)
        assert match.blocks is not None
        found += [(r.first, r.last) for r in match.blocks.ranges]
    return found


def test_use_brings_rules_in_before_ones_own(tmp_path: Path) -> None:
    main = write(
        tmp_path,
        main='use "parts/one.graft"\n' + RULE.format(name="own", blocks="odd"),
        parts__one=RULE.format(name="used", blocks="even"),
    )
    rules = check(main)
    assert names(rules) == ["used", "own"]
    assert [Path(f).name for f in rules.files] == ["main.graft", "one.graft"]


def test_a_used_parameter_is_set_by_the_user_and_by_the_command_line(tmp_path: Path) -> None:
    library = "set middle = 8..20\n" + RULE.format(name="used", blocks="middle")
    main = write(tmp_path, main='use "lib.graft"\n', lib=library)
    assert first_last(check(main)) == [(8, 20)]
    assert first_last(check(main, {"middle": "1..2"})) == [(1, 2)]
    write(tmp_path, main='use "lib.graft"\nset middle = 4..10\n')
    assert first_last(check(main)) == [(4, 10)]
    assert first_last(check(main, {"middle": "1..2"})) == [(1, 2)]
    assert check(main).parameters == {"middle": "4..10"}


def test_rules_are_picked_by_name(tmp_path: Path) -> None:
    library = RULE.format(name="one", blocks="odd") + RULE.format(name="two", blocks="even")
    main = write(tmp_path, main='use two from "lib.graft"\n', lib=library)
    assert names(check(main)) == ["two"]


def test_what_ships() -> None:
    for path in sorted(rules_folder().rglob("*.graft")):
        name = ".".join(path.relative_to(rules_folder()).with_suffix("").parts)
        assert names(check(Source("a.graft", f"use {name}\n"))) == names(check(path))
    assert names(check(Source("a.graft", "use std.mixers.local_window\n"))) == ["local_window"]


def test_a_file_used_twice_brings_its_rules_once(tmp_path: Path) -> None:
    main = write(
        tmp_path,
        main='use "a.graft"\nuse "b.graft"\n',
        a='use "c.graft"\n',
        b='use "c.graft"\n',
        c=RULE.format(name="shared", blocks="odd"),
    )
    assert names(check(main)) == ["shared"]


def test_files_that_use_each_other(tmp_path: Path) -> None:
    main = write(tmp_path, main='use "b.graft"\n', b='use "c.graft"\n', c='use "b.graft"\n')
    (found,) = mistakes(main)
    assert found.code == "G142"
    assert "b.graft → c.graft → b.graft" in found.message
    write(tmp_path, main='use "main.graft"\n')
    assert mistakes(main)[0].code == "G142"


def test_a_used_file_must_not_leave_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.graft"
    outside.write_text(RULE.format(name="out", blocks="odd"))
    inner = tmp_path / "inner"
    main = write(inner, main='use "../outside.graft"\n')
    assert mistakes(main)[0].code == "G141"
    (inner / "link.graft").symlink_to(outside)
    write(inner, main='use "link.graft"\n')
    assert mistakes(main)[0].code == "G141"
    write(inner, main=f'use "{outside}"\n')
    assert mistakes(main)[0].code == "G141"


def test_a_missing_used_file_suggests_a_near_one(tmp_path: Path) -> None:
    main = write(tmp_path, main='use "mixer.graft"\n', mixers=RULE.format(name="x", blocks="odd"))
    (found,) = mistakes(main)
    assert found.code == "G140"
    assert "mixers.graft" in (found.help or "")


def test_a_mistake_in_a_used_file_is_shown_there(tmp_path: Path) -> None:
    main = write(tmp_path, main='use "lib.graft"\n', lib="rule x {\n  match a = \n}\n")
    (found,) = mistakes(main)
    assert found.span is not None
    assert found.span.source.name.endswith("lib.graft")
    assert any(n.span and n.span.source.name.endswith("main.graft") for n in found.notes)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.graft").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.graft").write_bytes(b"")
    write(tmp_path, main=RULE.format(name="x", blocks="odd"))
    assert mistakes(tmp_path / "man.graft")[0].help == f"a near name is `{tmp_path / 'main.graft'}`"
    assert mistakes(tmp_path)[0].code == "G001"
    (found,) = mistakes(tmp_path / "latin.graft")
    assert found.code == "G008"
    assert "0xe9" in (found.found or "")
    (found,) = mistakes(tmp_path / "empty.graft")
    assert found.code == "G009"
    assert "this file has no rules" in found.message


def test_every_independent_mistake_is_reported_in_order() -> None:
    text = (
        "rule a {\n    match   x = self_atention in blocks 9..3\n    replace x with hyena_z()\n}\n"
        "rule b {\n    match   y = mlp in blocks odd\n    where   heads(y) > 2, tokns(y) > 3\n"
        "    replace y with mlp(ratio = -1, activation = gleu)\n    distill l7, sampels = 8k\n    expect  0\n}\n"
    )
    found = mistakes(Source("a.graft", text))
    first, second = found[:3], found[3:]
    assert [d.code for d in first] == ["G101", "G130", "G102"]
    assert [d.code for d in second] == ["G125", "G104", "G122", "G121", "G121", "G110", "G122"]


def test_mistakes_of_syntax_do_not_hide_those_of_other_rules() -> None:
    text = (
        "rule a {\n    match   x = mpl in blocks odd\n    remove  x\n}\n"
        "rule b {\n    match   y = mlp in blocks odd\n    remve   y\n}\n"
        "rule c after a, b {\n    match   z = mlp in blocks 3..1\n    remove  z\n}\n"
        "rule d {\n    match   z = mlp in bloks odd\n    remove  z\n}\n"
    )
    codes = [d.code for d in mistakes(Source("a.graft", text))]
    assert codes == ["G010", "G010", "G101", "G130"]


def test_check_and_format_do_not_read_a_python_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('this must not run')\n")
    text = 'rule r {\n    match   a = self_attention in blocks odd\n    replace a with python("mine.py:Mixer", kernel = 3)\n}\n'
    file = write(tmp_path, main=text)
    rules = check(file)
    assert rules.notes == ()
    assert rules.python == {}
    assert format_text(text) == text


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ("python()", "G120"),
        ('python("mine.py")', "G120"),
        ('python("mine:Mixer")', "G120"),
        ('python("mine.py:not a name")', "G120"),
        ('python("a.py:A", "b.py:B")', "G120"),
        ('python("a.py:A", k = 1, k = 2)', "G119"),
    ],
)
def test_how_a_python_operator_is_named(written: str, code: str) -> None:
    text = f"rule r {{\n  match a = mlp in blocks odd\n  replace a with {written}\n}}\n"
    assert [d.code for d in mistakes(Source("a.graft", text))] == [code]


def test_operators_can_be_given() -> None:
    document = parse(
        Source(
            "a.graft", "rule r {\n match a = mlp in blocks odd\n replace a with mlp(ratio = 3)\n}"
        )
    )
    with pytest.raises(GraftError, match="G102"):
        resolve(document, operators={}, merges={})


def test_check_does_not_import_torch() -> None:
    script = (
        "import sys; from graftc.language.check import check; from graftc.language.formatter import format_text;"
        "check(sys.argv[1]); print(sorted(m for m in ('torch', 'numpy', 'networkx', 'yaml') if m in sys.modules))"
    )
    corpus = Path(__file__).parent.parent / "corpus" / "hyena_and_pairs.graft"
    out = subprocess.run(
        [sys.executable, "-c", script, str(corpus)], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
