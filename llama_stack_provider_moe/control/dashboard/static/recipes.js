// Recipes by what the pages offer for them; a test compares the lists with the server's recipes.

// The server profiles their rows.
export const PROFILED = ["sft", "dpo", "circuit_breaker", "grpo", "kto", "reward", "distill"];
// Their result writes text: it can be exported, and tried in the playground.
export const WRITE_TEXT = ["sft", "dpo", "circuit_breaker", "grpo", "kto", "distill"];
// Their model writes the answers that it learns from.
export const WRITE_ANSWERS = ["grpo", "distill"];
