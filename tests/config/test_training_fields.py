"""Training fields that are read a second time, as a run's config.yaml holds them."""

from reltune.config.training_fields import checked_training_fields, parse_training_fields


def test_a_flag_without_a_value_is_read_again_as_it_was() -> None:
    given = parse_training_fields(["--fsdp"])
    assert given == {"fsdp": True} and checked_training_fields(given) == given
