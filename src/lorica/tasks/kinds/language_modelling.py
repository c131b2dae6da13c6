"""The next tokens of texts, completions and the assistant's turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorica.errors import UserError
from lorica.tasks.kind import TaskKind
from lorica.tasks.made_up import TEXTS
from lorica.tasks.readers import Source

if TYPE_CHECKING:
    from lorica.tasks.records import Objective, Passes, Records


# What a prediction decodes where `task.answer_tokens` is not set.
ANSWER_TOKENS = 64


class LanguageModelling(TaskKind):
    """The next tokens, by their mean cross entropy in each record; the base model keeps its own head.

    The pieces are in `lorica.tasks.causal`.
    """

    columns = ("text",)
    model_class = "AutoModelForCausalLM"
    targets = ()
    own_head = True
    pipeline_tag = "text-generation"
    peft_task = "CAUSAL_LM"
    default_metrics = ("token_accuracy", "perplexity")

    @property
    def metrics(self) -> list[str]:
        decoded = [] if self.config.answer_tokens is None else ["exact_match"]
        return [*self.default_metrics, *decoded]

    def processor(self, base: str) -> Any:
        from lorica.tasks.text import load_tokenizer

        return load_tokenizer(base)

    def records(self, source: Source, label_names: list[str], processor: Any, keep_texts: bool) -> Records:
        from lorica.tasks.causal.tokenising import tokenise_causal

        records = tokenise_causal(source, self.config.text, processor, self.config.max_length)
        if keep_texts and self.config.answer_tokens is not None and not source.private:
            from lorica.tasks.causal.answers import references

            references(records, processor, self.config.answer_format)
        return records

    def predictions(
        self, model: Any, source: Source, label_names: list[str], processor: Any, passes: Passes
    ) -> list[dict[str, Any]]:
        from lorica.tasks.causal.answers import continued
        from lorica.tasks.causal.tokenising import tokenise_prompts

        prompts = tokenise_prompts(source, self.config.text[0], processor)
        most = self.config.answer_tokens or min(ANSWER_TOKENS, processor.model_max_length // 2)
        return [{"text": text} for text in continued(model, prompts, processor, most, passes)]

    def input_keys(self) -> dict[str, str]:
        """The column of prompts, or the one of texts or conversations."""
        return {self.config.text[0]: "task.text"}

    def objective(self, processor: Any) -> Objective:
        from lorica.tasks.causal.objective import NextTokenObjective

        tokens = self.config.answer_tokens
        if tokens is not None and tokens >= processor.model_max_length:
            problem = f"the model takes {processor.model_max_length} tokens, prompt and answer together"
            raise UserError("task.answer_tokens", tokens, problem, "lower task.answer_tokens")
        return NextTokenObjective(processor, self.config.answer_tokens, self.config.answer_format)

    def made_up(self, label_names: list[str]) -> dict[str, list[Any]]:
        return dict.fromkeys(self.config.text, TEXTS)

    @classmethod
    def prepare_model(cls, model: Any, base: str) -> None:
        from lorica.tasks.models import check_causal

        # Training never continues a text; a cache would only take memory.
        model.config.use_cache = False
        check_causal(model, base)
