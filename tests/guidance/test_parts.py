"""The descriptions of the parts of guidance."""

from types import SimpleNamespace

from guidance import PAG, PARTS, SEG, Adaptive, NegToMe
from guidance.parts import chosen
from guidance.registry import BESIDE_RULES

BY_FIELD = {part.field: part for part in PARTS}
NOTHING = dict.fromkeys(BY_FIELD) | {part.field: () for part in PARTS if part.many}


def test_each_part_is_described_once() -> None:
    assert len(BY_FIELD) == len(PARTS)
    assert len({part.plural for part in PARTS}) == len({part.label for part in PARTS}) == len(PARTS)
    assert all(part.description.endswith(".") for part in PARTS)


def test_a_part_without_names_has_one_class() -> None:
    assert all(part.named or len(part.kinds) == 1 for part in PARTS)
    assert BY_FIELD["perturbed"].by_name["pag"] is PAG
    assert BY_FIELD["skip_tuning"].by_name == {}


def test_defaults_are_of_the_parts_own_classes() -> None:
    for part in PARTS:
        assert part.default is None or (isinstance(part.default, part.kinds) and not part.many)


def test_what_is_chosen_is_listed_with_its_path() -> None:
    given = {"policy": Adaptive(), "perturbed": (PAG(), SEG()), "negtome": NegToMe()}
    listed = list(chosen(SimpleNamespace(**NOTHING | given)))
    assert listed == [
        ("policy", Adaptive()),
        ("perturbed.0", PAG()),
        ("perturbed.1", SEG()),
        ("negtome", NegToMe()),
    ]


def test_no_parameter_of_a_rule_may_have_the_name_of_a_part() -> None:
    assert tuple(part.field for part in PARTS) == BESIDE_RULES
