"""CountDown with three numbers: reach the target using each number once, thinking aloud.

A response is a search: attempts separated by ``;``, each one or two steps ``a op b = c`` on what
is left of the numbers, and an end mark after the attempt that the writer believes in. The reward
is 1 if that last attempt is a valid derivation of the target, else 0. Integers from 0 to 99 are
one token each, so lengths go from 10 tokens to the limit with the number of attempts.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

LARGEST = 99
OPERATORS = "+-*/"
SYMBOLS = [str(n) for n in range(LARGEST + 1)] + [*OPERATORS, "=", ";", ":", ">", "<end>"]
IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
END, NEXT = IDS["<end>"], IDS[";"]
VOCABULARY = len(SYMBOLS)
PROMPT_TOKENS = 6
STEP_TOKENS = 5

Step = tuple[int, str, int, int]  # a, operator, b, result


@dataclass(frozen=True)
class Problem:
    """Three numbers and a target that at least one derivation reaches."""

    numbers: tuple[int, int, int]
    target: int

    def prompt(self) -> list[int]:
        """The problem as PROMPT_TOKENS token ids: ``n n n : target >``."""
        symbols = [*map(str, self.numbers), ":", str(self.target), ">"]
        return [IDS[symbol] for symbol in symbols]


def calculate(a: int, operator: str, b: int) -> int | None:
    """The result of a step, or None where it is not an integer from 0 to LARGEST."""
    if operator == "/":
        result = a // b if b and a % b == 0 else None
    else:
        result = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return result if result is not None and 0 <= result <= LARGEST else None


def steps(numbers: tuple[int, ...]) -> Iterator[tuple[Step, tuple[int, ...]]]:
    """Every step on two of the numbers, and the numbers that are left after it."""
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        for operator in OPERATORS:
            result = calculate(numbers[i], operator, numbers[j])
            if result is not None:
                yield (numbers[i], operator, numbers[j], result), (*rest, result)


def derivations(numbers: tuple[int, int, int]) -> list[tuple[Step, Step]]:
    """Every pair of steps that uses all three numbers."""
    return [(first, second) for first, left in steps(numbers) for second, _ in steps(left)]


def problems(largest_number: int = 12) -> list[Problem]:
    """All solvable problems with numbers from 1 to ``largest_number``, in a fixed order."""
    found = []
    for numbers in itertools.combinations_with_replacement(range(1, largest_number + 1), 3):
        targets = {second[3] for _, second in derivations(numbers)}
        found += [Problem(numbers, target) for target in sorted(targets) if target > 0]
    return found


def split(held_out: int, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, disjoint; the numbers in shuffled order."""
    everything = problems()
    shuffle = random.Random(seed)
    shuffle.shuffle(everything)
    everything = [Problem(tuple(shuffle.sample(p.numbers, 3)), p.target) for p in everything]
    return everything[held_out:], everything[:held_out]


def trace(problem: Problem, random_source: random.Random, more: float, most: int) -> list[int]:
    """A supervised response: wrong attempts, then a right one.

    Another wrong attempt comes with probability ``more``, up to ``most``; half of them stop after
    one step. So lengths vary, and a long response is no sign of a hard problem.
    """
    choices = derivations(problem.numbers)
    right = [pair for pair in choices if pair[1][3] == problem.target]
    wrong = [pair for pair in choices if pair[1][3] != problem.target]
    response: list[int] = []
    for _ in range(most):
        if not wrong or random_source.random() >= more:
            break
        attempt = random_source.choice(wrong)[: random_source.choice((1, 2))]
        response += [*encode(attempt), NEXT]
    return response + [*encode(random_source.choice(right)), END]


def encode(attempt: tuple[Step, ...]) -> list[int]:
    """Token ids of the steps of one attempt."""
    symbols: list[str] = []
    for a, operator, b, result in attempt:
        symbols += [str(a), operator, str(b), "=", str(result)]
    return [IDS[symbol] for symbol in symbols]


def reward(problem: Problem, response: list[int]) -> float:
    """1 if the response ends, and its last attempt derives the target; else 0."""
    if not response or response[-1] != END:
        return 0.0
    attempt: list[int] = []
    for token in response[:-1]:
        attempt = [] if token == NEXT else [*attempt, token]
    left = sorted(problem.numbers)
    if len(attempt) != STEP_TOKENS * (len(left) - 1):
        return 0.0
    for start in range(0, len(attempt), STEP_TOKENS):
        a, operator, b, equals, result = attempt[start : start + STEP_TOKENS]
        if SYMBOLS[operator] not in OPERATORS or SYMBOLS[equals] != "=":
            return 0.0
        if max(a, b, result) > LARGEST:  # the ids of integers are the integers
            return 0.0
        for used in (a, b):
            if used not in left:
                return 0.0
            left.remove(used)
        if calculate(a, SYMBOLS[operator], b) != result:
            return 0.0
        left.append(result)
    return float(left == [problem.target])
