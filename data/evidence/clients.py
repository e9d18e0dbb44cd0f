"""Other people's clients with our server: what works with which.

They get an environment of their own below `build/`. Each asks the server with the sensors and
movies adapters; what it got is compared with what our own client got.
"""

import json
import os
import subprocess
import textwrap
import venv
from pathlib import Path
from typing import Any

from lib.base.records import movies, sensors
from lib.client import ask_all, question
from lib.errors import require
from lib.files import BUILD, scratch
from lib.serve.server import running

ENVIRONMENT = BUILD / "clients"
PINS = ("openai==3.57.0", "langchain-openai==1.7.4", "litellm==1.110.2", "llm==0.36",
        "lm-eval[api]==0.4.13")
VERDICTS = ["positive", "negative"]
SCHEMA = {"type": "object", "properties": {"verdict": {"enum": VERDICTS}},
          "required": ["verdict"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "clock", "description": "The time.",
                                         "parameters": {"type": "object", "properties": {}}}}
# Each prints one JSON object: what it got for a question in one piece, as a stream, for a schema,
# and what it says of a tool, which the course's chat template does not know.
PROGRAMS = {
    "openai": """
        from openai import OpenAI
        client = OpenAI(base_url=url, api_key="-", max_retries=0)
        def create(model=name, text=asked, **more):
            return client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": text}], temperature=0,
                max_tokens=56, **more)
        def answer(): return create().choices[0].message.content
        def stream(): return "".join(part.choices[0].delta.content or ""
                                     for part in create(stream=True) if part.choices)
        def schema(): return create("movies", film, response_format={
            "type": "json_schema", "json_schema": {"name": "v", "schema": SCHEMA}}
            ).choices[0].message.content
        def tool(): return create(tools=[TOOL])
        """,
    "langchain-openai": """
        from langchain_openai import ChatOpenAI
        def chat(model=name): return ChatOpenAI(
            base_url=url, api_key="-", model=model, temperature=0, max_tokens=56, max_retries=0)
        def answer(): return chat().invoke(asked).content
        def stream(): return "".join(part.content for part in chat().stream(asked))
        def schema(): return json.dumps(chat("movies").with_structured_output(
            {"title": "v"} | SCHEMA, method="json_schema").invoke(film))
        def tool(): return chat().bind_tools([TOOL]).invoke(asked)
        """,
    "litellm": """
        import litellm
        def create(model=name, text=asked, **more):
            return litellm.completion(
                model=f"openai/{model}", api_base=url, api_key="-", temperature=0, max_tokens=56,
                messages=[{"role": "user", "content": text}], **more)
        def answer(): return create().choices[0].message.content
        def stream(): return "".join(part.choices[0].delta.content or ""
                                     for part in create(stream=True))
        def schema(): return create("movies", film, response_format={
            "type": "json_schema", "json_schema": {"name": "v", "schema": SCHEMA}}
            ).choices[0].message.content
        def tool(): return create(tools=[TOOL])
        """,
    "llm": """
        import os, pathlib, subprocess, sys, tempfile
        home = pathlib.Path(os.environ["LLM_USER_PATH"])
        home.joinpath("extra-openai-models.yaml").write_text("".join(
            f"- model_id: my-{model}\\n  model_name: {model}\\n  api_base: {url}\\n"
            "  supports_schema: true\\n  supports_tools: true\\n"
            for model in (name, "movies")))
        def run(text, *more, model=name):
            done = subprocess.run([pathlib.Path(sys.executable).with_name("llm"), "-m",
                f"my-{model}", "--key", "-", "-o", "temperature", "0", "-o", "max_tokens", "56",
                *more, text], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout.removesuffix("\\n")
        def answer(): return run(asked, "--no-stream")
        def stream(): return run(asked)
        def schema(): return run(film, "--schema", json.dumps(SCHEMA), model="movies")
        def tool(): return run(asked, "-T", "llm_time")
        """}
FRAME = """
import json, sys
url, name, asked, film, SCHEMA, TOOL = json.loads(sys.argv[1])
{program}
got = {{}}
for part in (answer, stream, schema, tool):
    try:
        got[part.__name__] = str(part())
    except Exception as error:
        got[part.__name__] = "refused: " + str(error)
print(json.dumps(got))
"""
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{instruction}}}}"
doc_to_target: "{{{{response}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 56, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def install() -> Path:
    """The Python of an environment with the clients, made once."""
    python, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "made.json"
    if not done.is_file() or json.loads(done.read_text()) != list(PINS):
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINS], check=True)
        done.write_text(json.dumps(PINS))
    return python


def clients(folder: Path) -> dict[str, Any]:
    """What each client got: right, or the words with which it reports a refusal."""
    python, record = install(), sensors("test", 1)[0]
    asked, film = record["instruction"], movies("test", 1)[0]["instruction"]
    rows: dict[str, Any] = {}
    with running(folder) as served, scratch() as work:
        wanted = ask_all(served.url, [question(asked, model="sensors")])[0].text
        environment = os.environ | {"LLM_USER_PATH": str(work), "HF_HUB_OFFLINE": "1",
                                    "HF_HOME": str(work), "OPENAI_API_KEY": "-"}
        given = json.dumps([served.url, "sensors", asked, film, SCHEMA, TOOL])
        for name, program in PROGRAMS.items():
            done = subprocess.run(
                [python, "-c", FRAME.format(program=textwrap.dedent(program)), given],
                capture_output=True, encoding="utf-8", env=environment, cwd=work)
            require(not done.returncode, f"{name} does not run: {done.stderr[-500:]}")
            got = json.loads(done.stdout.splitlines()[-1])
            rows[name] = {"answer": got["answer"].strip() == wanted,
                          "stream": got["stream"].strip() == wanted,
                          "schema": json.loads(got["schema"])["verdict"] in VERDICTS,
                          "tool": got["tool"][:300]}
            print(name, rows[name], flush=True)
        rows["lm-eval"] = lm_eval(python, served.url, work, environment)
    return {"versions": PINS, "clients": rows}


def lm_eval(python: Path, url: str, work: Path, environment: dict[str, str]) -> dict[str, Any]:
    """A task of one's own through `local-chat-completions`, beside our own client's answers."""
    records = sensors("test", 40)
    file = work / "records.jsonl"
    file.write_text("".join(json.dumps({"instruction": r["instruction"], "response": r["response"]})
                            + "\n" for r in records), encoding="utf-8")
    (work / "mine.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    subprocess.run(
        [python.with_name("lm_eval"), "--model", "local-chat-completions", "--model_args",
         f"model=sensors,base_url={url}/chat/completions,num_concurrent=4", "--tasks", "mine",
         "--include_path", work, "--apply_chat_template", "--output_path", work / "out"],
        check=True, env=environment, cwd=work)
    result = json.loads(next(work.glob("out/**/results_*.json")).read_text())["results"]["mine"]
    ours = ask_all(url, [question(r["instruction"], model="sensors") for r in records])
    hits = sum(a.text == r["response"] for a, r in zip(ours, records, strict=True))
    return {"records": len(records), "exact_match": result["exact_match,none"],
            "ours": hits / len(records)}
