"""Rows as people write them, and their canonical form."""

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
