"""The place of the answer to a question in a context, as in SQuAD."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.tasks.kind import TaskKind
from lorica.tasks.made_up import TEXTS
from lorica.tasks.questions.squad_json import read_squad_json
from lorica.tasks.readers import Source

if TYPE_CHECKING:
    import pyarrow as pa

    from lorica.tasks.records import Objective, Passes, Records


class QuestionAnswering(TaskKind):
    """The first and the last token of an answer, or none; a question with all windows over its context is one record.

    The pieces are in `lorica.tasks.questions`.
    """

    columns = ("question", "context", "answers")
    model_class = "AutoModelForQuestionAnswering"
    targets = ("answers",)
    heads = ("qa_outputs",)
    pipeline_tag = "question-answering"
    # PEFT 0.21 has QUESTION_ANS, but its model drops `token_type_ids`, and then finds other answers.
    peft_task = None
    default_metrics = ("exact_match", "f1")

    def read_file(self, path: Path, key: str) -> pa.Table | None:
        """The official files end in `.json`."""
        return read_squad_json(path, key) if path.suffix.lower() == ".json" else None

    def processor(self, base: str) -> Any:
        from lorica.tasks.text import load_tokenizer

        return load_tokenizer(base)

    def records(self, source: Source, label_names: list[str], processor: Any, keep_texts: bool) -> Records:
        from lorica.tasks.questions.tokenising import tokenise_questions

        config = self.config
        columns = (config.question, config.context, config.answers)
        lengths = (config.max_length, config.stride, config.max_question)
        return tokenise_questions(source, *columns, processor, *lengths, keep_texts)

    def predictions(
        self, model: Any, source: Source, label_names: list[str], processor: Any, passes: Passes
    ) -> list[dict[str, Any]]:
        import pyarrow as pa

        from lorica.tasks.questions.answers import all_answers

        nothing: list[Any] = [{"text": [], "answer_start": []}] * source.table.num_rows
        kind = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int64()))])
        table = source.table.append_column(self.config.answers, pa.array(nothing, kind))
        records = self.records(replace(source, table=table), label_names, processor, keep_texts=True)
        found = all_answers(model, records, passes, self.config.null_threshold, self.config.max_answer)
        return [{"answer": answer} for answer in found]

    def objective(self, processor: Any) -> Objective:
        from lorica.tasks.questions.objective import SpanObjective

        return SpanObjective(self.config.null_threshold, self.config.max_answer)

    def made_up(self, label_names: list[str]) -> dict[str, list[Any]]:
        answers = [{"text": [text[0]], "answer_start": [0]} for text in TEXTS]
        return {self.config.question: TEXTS, self.config.context: TEXTS, self.config.answers: answers}

    @classmethod
    def outputs(cls, label_names: list[str]) -> int:
        """One score for an answer's first token and one for its last."""
        return 2
