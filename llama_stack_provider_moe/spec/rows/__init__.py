"""Rows as people write them, and their canonical form. Each name loads its module, like those of `spec`."""

from typing import TYPE_CHECKING

from llama_stack_provider_moe.ground.lazy_package import loader

if TYPE_CHECKING:
    from llama_stack_provider_moe.spec.rows.columns import check_columns, check_found
    from llama_stack_provider_moe.spec.rows.messages import (
        ROLES,
        CanonicalRow,
        Conversation,
        FunctionCall,
        Message,
        Preference,
        PromptRow,
        Role,
        TextRow,
        ThumbRow,
        ToolCall,
    )
    from llama_stack_provider_moe.spec.rows.reading import canonical, conversation
    from llama_stack_provider_moe.spec.rows.report import RowsReport

__all__ = [
    "ROLES",
    "CanonicalRow",
    "Conversation",
    "FunctionCall",
    "Message",
    "Preference",
    "PromptRow",
    "Role",
    "RowsReport",
    "TextRow",
    "ThumbRow",
    "ToolCall",
    "canonical",
    "check_columns",
    "check_found",
    "conversation",
]

# Module -> the names that it has for this package.
_NAMES = {
    "columns": ("check_columns", "check_found"),
    "messages": (
        "ROLES", "CanonicalRow", "Conversation", "FunctionCall", "Message", "Preference", "PromptRow", "Role",
        "TextRow", "ThumbRow", "ToolCall",
    ),
    "reading": ("canonical", "conversation"),
    "report": ("RowsReport",),
}  # fmt: skip

if not TYPE_CHECKING:
    __getattr__ = loader(__name__, _NAMES, globals())
