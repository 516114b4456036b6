"""Problems that pydantic found in a provider's `config:` -> one line for each: path, value, expectation."""

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from llama_stack_provider_moe.errors import InvalidConfig
from llama_stack_provider_moe.ground.redaction import HIDDEN, names_secret, without_passwords
from llama_stack_provider_moe.spec.default_blocks import DEFAULT_BLOCKS
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.validation_errors import invalid_body


def checked[Config: BaseModel](settings: Mapping[str, object], where: str, model: type[Config]) -> Config:
    """Return the configuration.

    Args:
        settings: a `config:` with its variables filled in.
        where: file and provider, for errors.
        model: of the provider.

    Raises:
        InvalidConfig: a setting is not valid.
    """
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        raise InvalidConfig(where, lines(error, model)) from None


def lines(error: ValidationError, model: type[BaseModel] = ProviderConfig) -> list[str]:
    """Return one line for each problem, without values of settings that may be secrets."""
    return [without_passwords(_line(each["loc"], dict(each), model)) for each in error.errors(include_url=False)]


def _line(location: tuple[int | str, ...], error: dict[str, object], model: type[BaseModel]) -> str:
    if any(names_secret(str(part)) for part in location) or location[:1] in (("child_env",), ("store_url",)):
        error["input"] = HIDDEN
    if location[:1] == ("defaults",) and len(location) > 1 and location[1] in DEFAULT_BLOCKS:
        block = str(location[1])
        prefix = f"defaults.{block}"
        inside = {**error, "loc": location[2:]}
        return str(invalid_body([inside], DEFAULT_BLOCKS[block], lambda path: f"{prefix}.{path}".rstrip(".")))
    if not location and error["type"] != "value_error":
        return "config: is not valid; expected a block of settings"
    return str(invalid_body([error], model))
