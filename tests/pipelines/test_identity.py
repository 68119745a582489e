import hashlib

import pytest

from pipelines import identity


def test_an_image_id_is_the_first_half_of_the_digest_of_its_bytes():
    digest = hashlib.sha256(b"picture").hexdigest()
    assert identity.image_id_of_bytes(b"picture") == (digest[:32], digest)


def test_every_id_has_32_hexadecimal_characters():
    ids = [
        identity.image_id_of_bytes(b"")[0],
        identity.image_id_of_uid("pickapic", "u"),
        identity.prompt_id("a cat"),
        identity.pair_id("p", "a", "b"),
        identity.vote_id("s", "r:0", 0),
    ]
    assert [len(i) for i in ids] == [32] * 5
    assert all(set(i) <= set("0123456789abcdef") for i in ids)
    assert len(set(ids)) == 5


def test_prompts_that_differ_in_composition_or_outer_space_only_are_one_prompt():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert composed != decomposed
    assert identity.prompt_id(composed) == identity.prompt_id(f"  {decomposed}\n")
    assert identity.normalise_prompt(f"  {decomposed}\n") == composed


def test_prompts_that_differ_in_case_or_inner_space_are_two_prompts():
    assert len({identity.prompt_id(p) for p in ("a cat", "A cat", "a  cat")}) == 3


def test_a_uid_belongs_to_its_family():
    assert identity.image_id_of_uid("pickapic", "1") != identity.image_id_of_uid("hpd", "1")


def test_a_pair_of_images_in_the_wrong_order_or_of_one_image_is_refused():
    for first, second in (("b", "a"), ("a", "a")):
        with pytest.raises(ValueError, match="image_0_id < image_1_id"):
            identity.pair_id("p", first, second)


def test_parts_of_a_key_do_not_run_into_each_other():
    assert identity.vote_id("a", "b1", 1) != identity.vote_id("a", "b", 11)
    assert identity.pair_id("p", "a", "bc") != identity.pair_id("pa", "b", "c")


def test_a_fingerprint_ignores_the_order_of_names_and_sees_every_value():
    assert identity.fingerprint(a=1, b={"x": 1, "y": 2}) == identity.fingerprint(b={"y": 2, "x": 1}, a=1)
    assert len({identity.fingerprint(a=v) for v in (1, 2, "1", None, [1], {"1": 1})}) == 6
