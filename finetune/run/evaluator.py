"""The evaluations of a run: when they are due, what they write, and whether the run is over."""

from typing import Any

import torch
from torch import Tensor

from finetune.config import Config
from finetune.config_checks import may_be_best_by
from finetune.data.plan import Indices, Plan, plan_evaluation
from finetune.data.rows import iterate_rows
from finetune.data.splits import Data
from finetune.model.generate import generate_answers
from finetune.model.loss import TokenLoss
from finetune.run.checkpoint import Checkpointer, History, TrainState
from finetune.run.eval_answers import answer_questions, choose_questions, show_questions
from finetune.run.tracker import Tracker
from finetune.runtime.processes import on_main
from finetune.runtime.signals import StopRequest
from finetune.training.answer_scores import mean_scores, score
from finetune.training.best import is_out_of_patience
from finetune.training.evaluate import evaluate, evaluation_metrics, loss_error, pick_conversations

PROBED = 16  # eval examples that are computed in fp32 too, to measure the error of the others


class Evaluator:
    """Evaluates on the eval rows and writes a few answers, before training, in between and at the end.

    What it finds is appended to `history`.
    """

    def __init__(
        self,
        accelerator: Any,
        config: Config,
        token_loss: TokenLoss,
        tokenizer: Any,
        plan: Plan,
        data: Data,
        tracker: Tracker,
        stop: StopRequest,
        history: History,
    ) -> None:
        self._accelerator, self._config, self._plan = accelerator, config, plan
        self._token_loss, self._tokenizer = token_loss, tokenizer
        self._eval_set, self._leaks = data.eval, data.leaks
        self._rounds = accelerator.mixed_precision != "no" and config.eval.precision == "run"
        self._conversations = pick_conversations(iterate_rows(data.rows.eval), config.data.system_prompt)
        self._tracker, self._stop, self._history = tracker, stop, history
        self._questions = choose_questions(config, tokenizer, data.rows)
        if accelerator.is_main_process:
            show_questions(self._questions, config.eval.answers)
        self._require_best_by()

    def is_over(self, step: int) -> bool:
        """Whether all updates are made, or `train.early_stopping_patience` has run out."""
        patience, by = self._config.train.early_stopping_patience, self._config.checkpoint.best_by
        return step == self._plan.num_steps or is_out_of_patience(self._history, patience, by)

    def run_if_due(self, state: TrainState, checkpointer: Checkpointer) -> None:
        """Make the evaluation and the answers that are due after `state.step` updates, unless they were made
        before a kill. With `keep_best` a checkpoint is saved first: it may become the best."""
        step = state.step
        due = self._config.eval.at_start if step == 0 else self._plan.is_due(self._config.eval.every, step)
        if due and len(self._eval_set.dataset) > 0 and not self._tracker.was_made("eval", step):
            if self._config.checkpoint.keep_best:
                checkpointer.save(state, self._history)
            self._evaluate(step)
        at_either_end = step == 0 or self.is_over(step)
        if at_either_end and self._conversations and not self._tracker.was_made("answers", step):
            self._write_answers(step)

    def _evaluate(self, step: int) -> None:
        self._tracker.show_activity("evaluating")
        sums = self._sums(plan_evaluation(self._plan, self._eval_set), self._config.eval.precision)
        if sums is None:  # stopped midway: it is made when the run resumes
            return
        metrics = evaluation_metrics(sums, self._eval_set, self._leaks, self._config.eval.sets or ())
        if self._rounds:
            exact = self._sums(plan_evaluation(self._plan, self._eval_set, PROBED), "fp32")
            if exact is None:
                return
            metrics["loss_error"] = loss_error(sums[:PROBED], exact[:PROBED])
        if self._questions:
            self._tracker.show_activity(f"answering {len(self._questions)} eval rows")
            together = self._plan.collective
            answers = answer_questions(
                self._accelerator, self._token_loss, self._tokenizer, self._questions, self._stop, together
            )
            if answers is None:
                return
            scores = [score(*pair) for pair in zip(self._questions, answers, strict=True)]
            metrics |= mean_scores(scores)
            self._tracker.write_answer_scores(step, self._questions, answers, scores)
        self._tracker.write_example_sums(step, self._eval_set, sums)
        self._tracker.log("eval", step, metrics)
        self._history.append({"step": step, **metrics})

    def _sums(self, batches: list[Indices], precision: str) -> Tensor | None:
        dataset, packing = self._eval_set.dataset, self._plan.layout.packing
        how = packing, self._stop, precision, self._plan.collective
        return evaluate(self._accelerator, self._token_loss, batches, dataset, *how)

    def _write_answers(self, step: int) -> None:
        """All ranks generate the same answers, as a sharded base needs, and the main one writes them."""
        if self._stop.should_stop():
            return
        self._tracker.show_activity("writing a few answers")
        answers = generate_answers(self._accelerator, self._token_loss, self._tokenizer, self._conversations)
        on_main(self._accelerator, self._tracker.log_answers, step, self._conversations, answers)

    def _require_best_by(self) -> None:
        """Raise ValueError if the evaluations of this run lack the metric that `checkpoint.best_by` names."""
        by, eval_set = self._config.checkpoint.best_by, self._eval_set
        if by == "loss" or len(eval_set.dataset) == 0:
            return
        nothing = torch.ones(len(eval_set.dataset), 4, dtype=torch.float64)
        metrics = evaluation_metrics(nothing, eval_set, self._leaks, self._config.eval.sets or ())
        if self._questions:
            metrics |= mean_scores([score(question, question.reference) for question in self._questions])
        if by not in metrics:
            known = [metric for metric in metrics if may_be_best_by(metric)]
            raise ValueError(
                f"checkpoint.best_by: the evaluations of this run have no {by}, but {', '.join(known)}"
            )
