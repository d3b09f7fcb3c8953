"""report.evaluation: the scores of answers."""

from finetune.data.conversations import Conversation
from finetune.model.generate import Answer
from finetune.report.evaluation import Written, score_answers
from finetune.training.answer_scores import Question


def test_perfect_and_empty_answers_have_the_scores_of_such():
    right, wrong = Answer("It is four.", 5, True), Answer("", 1, False)
    question = Question(1, Conversation([]), [], right, [], None)
    scores = score_answers([Written(question, wrong, right)] * 2, 5)
    assert scores["chrf"].tuned.value == 100
    assert scores["chrf"].base.value == 0
    assert scores["ended"].change.value == 1
