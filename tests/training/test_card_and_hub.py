"""The model card, and the upload that happens only when asked for."""

import fnmatch

import huggingface_hub
import pytest
import yaml
from helpers.pipelines import train_options

from diffadapt.training import push_to_hub
from diffadapt.training.parsing import write_config
from diffadapt.training.report.model_card import base_licence, write_card

RECORD = {
    "method": "lora(rank=4)",
    "parameters": 1234,
    "steps": 7,
    "seconds": 1.5,
    "figures": {
        "drift[embedded:clip]": {"after": 0.25},
        "subject_similarity[x]": {"before": 0.1, "after": 0.9},
    },
}


def card_of(tmp_path, base):
    options = train_options(pretrained_model_name_or_path=base, output_dir=str(tmp_path))
    write_config(options, tmp_path)
    write_card(tmp_path, options, RECORD, title="A TITLE", sample_options="--prompt 'a sks dog'")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---")[1]), text


def test_the_card_says_how_it_was_made_and_how_it_is_used(tmp_path):
    (tmp_path / "grid.png").touch()
    header, text = card_of(tmp_path, "embedded:emoji")
    assert header["license"] == base_licence("embedded:emoji") == "apache-2.0"
    assert "base_model" not in header
    for words in (
        "# A TITLE",
        "![before and after](grid.png)",
        "| subject_similarity[x] | 0.100 | 0.900 |",
        "| drift[embedded:clip] |  | 0.250 |",
        "1,234 trained parameters",
        "DEMO",
        "diffadapt sample --base embedded:emoji --adapter adapter.safetensors --prompt 'a sks dog'",
        'from_pretrained(da.embedded("emoji"))',
        "accelerate launch",
        "max_train_steps: 6",
    ):
        assert words in text, words


def test_a_base_without_a_card_has_no_licence_made_up(tmp_path):
    header, text = card_of(tmp_path, "someone/some-base")
    assert "license" not in header
    assert header["base_model"] == "someone/some-base"
    assert "not named by a card at hand" in text
    assert "DEMO" not in text
    assert "grid.png" not in text
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert base_licence(str(tmp_path / "base")) == "mit"
    (tmp_path / "base" / "README.md").write_text("---\n[broken\n---\n", encoding="utf-8")
    assert base_licence(str(tmp_path / "base")) is None


class Api:
    """What the hub was asked to do."""

    calls: list = []  # noqa: RUF012

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name.removeprefix('me/')}")

    def upload_folder(self, **options):
        self.calls.append(("upload", options))
        return "https://huggingface.co/me/there"


@pytest.fixture
def api(monkeypatch):
    Api.calls = []
    monkeypatch.setattr(push_to_hub, "HfApi", Api)
    return Api


def test_an_upload_leaves_states_and_class_pictures_behind(api, tmp_path):
    options = train_options(push_to_hub=True, output_dir=str(tmp_path / "my-run"))
    assert push_to_hub.push(options) == "https://huggingface.co/me/there"
    (_, name, settings), (_, upload) = api.calls
    assert name == "my-run"
    assert settings == {"exist_ok": True, "private": None}
    assert upload["repo_id"] == "me/my-run"

    def is_sent(path):
        return not any(fnmatch.fnmatch(path, pattern) for pattern in upload["ignore_patterns"])

    sent = [
        "adapter.safetensors",
        "README.md",
        "run.json",
        "samples/after/subject-00.png",
        "adapter_comfyui.safetensors",
    ]
    kept = ["checkpoint-10/state.safetensors", ".unfinished-checkpoint-2/state.json", "logs/diffadapt/events"]
    assert all(map(is_sent, sent))
    assert not any(map(is_sent, [*kept, "class_images/class-00000.png", "samples/.adapter.tmp"]))


def test_a_refused_upload_says_that_the_result_is_there(api, tmp_path, monkeypatch):
    def refuse(self, **_):
        raise OSError("403 Forbidden")

    monkeypatch.setattr(Api, "upload_folder", refuse)
    with pytest.raises(
        OSError, match=r"the result is whole in .*my-run, .* 403 Forbidden; later: hf upload me/it"
    ):
        push_to_hub.push(
            train_options(push_to_hub=True, hub_model_id="me/it", output_dir=str(tmp_path / "my-run"))
        )


def test_without_a_login_the_run_does_not_start(monkeypatch):
    monkeypatch.setattr(push_to_hub, "get_token", lambda: None)
    push_to_hub.check_hub(train_options())
    with pytest.raises(ValueError, match="--push_to_hub needs a login"):
        push_to_hub.check_hub(train_options(push_to_hub=True))
    with pytest.raises(ValueError, match="--hub_model_id: "):
        push_to_hub.check_hub(train_options(hub_model_id="a/b/c"))
