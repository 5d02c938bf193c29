"""lm-evaluation-harness on a model that lies sharded on an engine: its tasks, prompts and metrics,
our ranks.

Reads the harness's task files (`evaluate.lm_eval.include_path` for local ones); writes nothing.
Every rank runs the same task code and asks for the same log-likelihoods and texts, which
`grads_ds.evaluate.generation` computes together. Seen with lm-eval 0.4.13.
"""

from __future__ import annotations

from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.distributed import ranks
from grads_ds.evaluate.generation import generate, log_likelihoods


def run_lm_eval(
    model: Any, tokenizer: Any, config: Config, model_name: str
) -> dict[str, dict[str, Any]]:
    """The harness's results by task: {"kind": "lm_eval", metric: value, ...}.

    Raises UserError on unknown tasks.
    """
    settings = config.evaluate.lm_eval
    assert settings is not None
    manager = TaskManager(
        include_path=settings.include_path, include_defaults=settings.include_path is None
    )
    unknown = [name for name in settings.tasks if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            [
                f"evaluate.lm_eval.tasks: wanted a task of the harness; found {name!r}; see"
                " include_path"
                for name in unknown
            ]
        )
    found = simple_evaluate(
        model=EngineModel(model, tokenizer, config, model_name),
        tasks=list(settings.tasks),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=manager,
        apply_chat_template=config.evaluate.chat,
        bootstrap_iters=config.evaluate.bootstrap,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
        log_samples=False,
    )
    # the harness gives rank 0 alone its results
    results: dict[str, Any] = ranks.from_main(lambda: found["results"])
    return {
        f"lm_eval/{task}": (
            {"kind": "lm_eval"}
            | {key: value for key, value in values.items() if isinstance(value, (int, float))}
        )
        for task, values in results.items()
    }


class EngineModel(TemplateLM):
    """What the harness asks of a model, answered by all ranks."""

    backend = "causal"

    def __init__(self, model: Any, tokenizer: Any, config: Config, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.settings, self.name = (
            model,
            tokenizer,
            config.evaluate,
            name,
        )
        self.longest = int(
            getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        )

    @property
    def eot_token_id(self) -> int:
        """The token that stands for an empty context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's cache keys."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; special tokens only when asked for."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The tokenizer's own template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Any]:
        pairs = [(list(context), list(continuation)) for _, context, continuation in requests]
        values, greedy = log_likelihoods(
            self.model,
            pairs,
            self.settings.tokens_per_microbatch,
            self.longest,
            f"{self.name} in lm_eval",
        )
        return list(zip(values.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The text's log-likelihood, in windows of the model's context that do not overlap."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for start in range(0, len(ids), self.longest - 1):
                pairs.append(
                    (
                        [ids[start - 1] if start else self.eot_token_id],
                        ids[start : start + self.longest - 1],
                    )
                )
                owners.append(number)
        values, _ = log_likelihoods(
            self.model, pairs, self.settings.tokens_per_microbatch, self.longest, self.name
        )
        sums = [0.0] * len(requests)
        for owner, value in zip(owners, values.tolist(), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to each request's own stops.

        Raises UserError when a task asks for sampling.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        answers = [""] * len(requests)
        for members in groups.values():
            wanted = requests[members[0]].args[1]
            if wanted.get("do_sample") and wanted.get("temperature", 0.0) > 0:
                raise UserError(
                    "evaluate.lm_eval: wanted a task with greedy decoding; found do_sample: true;"
                    " choose another"
                )
            until = wanted.get("until", [])
            until = [until] if isinstance(until, str) else list(until)
            out = generate(
                self.model,
                self.tokenizer,
                [requests[i].args[0] for i in members],
                int(wanted.get("max_gen_toks", self.settings.max_new_tokens)),
                self.settings.generation_batch,
                until,
                self.name,
            )
            for i, text in zip(members, out, strict=True):
                answers[i] = text
        return answers
