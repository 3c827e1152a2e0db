"""What is a secret is masked by one rule, wherever it is written down; prompts and sentences are left as they are."""

import json

import pytest
from limits import within

from dailies.jobs.cli import report_failure
from dailies.pipeline.run import ledger_row
from dailies.pipeline.run.masking import REMOVED, without_secrets

VALUE = "hunter2Hunter2"


@pytest.mark.parametrize("text", [
    "password {}", "Password: {}", "passwd:{}", "pwd={}", "PWD = '{}'", "passphrase {}", "bearer {}", "Bearer {}",
    "token {}",
    "token: {}", "Authorization: Basic {}", "authorization: Bearer {}", '"Authorization": "Digest {}, a={}"',
    "Proxy-Authorization: {}", "Cookie: a={}; b={}", "Basic {}==", '{{"password": "{}"}}', "{{'api_key': '{}'}}",
    "x-api-key: {}",
    "Server=a;Password={};x=1", "--password {}", "--api-key {}", "--hf-token={}", "AccountKey={}", "SharedAccessKey={}",
    "accessToken={}", "client_secret={}", "https://u:{}@host/a", "https://host/a?sig={}", "MY_TOKEN={}",
    "the secret {} is bad",
    'password="{} {}"', "session_token={}", "passwords: {}", "https://host/#access_token={}"])
def test_a_secret_in_a_text_is_masked_and_masked_once(text):
    masked = without_secrets(text.format(*[VALUE] * 2))
    assert "hunter" not in masked.lower() and (REMOVED in masked or masked == "https://host/a")
    assert without_secrets(masked) == masked


@pytest.mark.parametrize("text", ["pwd=x", "password x", "passwd: x", "Bearer x", "password swordfish", "--token x"])
def test_a_short_or_plain_secret_is_masked(text):
    assert without_secrets(text).endswith(REMOVED)


@pytest.mark.parametrize("said", [
    {"pwd": VALUE}, {"apiKey": VALUE}, {"clientSecret": {"a": [VALUE]}}, {"Authorization": VALUE}, {"x-api-key": VALUE},
    {"argv": ["render", "--password", VALUE]}, {"argv": ["--api-key", VALUE, "--x"]}, [f"--token={VALUE}"],
    {"a": {"b": ("pwd=" + VALUE,)}}])
def test_a_secret_in_settings_and_argv_is_masked(said):
    assert VALUE not in json.dumps(without_secrets(said))


def test_prompts_are_data_and_stay_as_they_are():
    said = {"prompt": ["password hunter2 on a wall", "token: 12345678"], "negative_prompt": "pwd=hunter2"}
    assert without_secrets({"job": said}) == {"job": said}


@pytest.mark.parametrize("text", [
    "a token is needed, and none was found", "the head asks for a token, and it refused the token of this environment",
    "Set RAY_AUTH_TOKEN_PATH to a file with the cluster's token, or RAY_AUTH_TOKEN", "s3://bucket/night?.parquet",
    "the password of the bucket", "basic training.csv", "tokenizer=umt5", "max 2,340 tokens", "--tokenizer umt5", "a=b",
    "token_study.csv", "key frames at 24", "the key is in the file", "secret garden.csv", "monkey: 5",
    "caption=prompt"])
def test_a_sentence_about_secrets_and_a_plain_setting_are_left(text):
    assert without_secrets(text) == text


@pytest.mark.parametrize("piece",
                         ["eyJ-", "eyJ-" * 30 + ".", "secret-", "password ", "token: ", "a.secret.b", 'secret="',
                          "authorization:",
                                   "cookie='", "--secret", "a://", "key ", "secret_", "=", " ", "-", "access_key_",
                          "-----BEGIN "])
def test_a_long_text_is_masked_at_once(piece):
    with within(10):
        without_secrets(piece * (400_000 // len(piece)))


def test_messages_and_the_errors_of_rows_are_masked(capsys):
    assert report_failure(5, "no access with Bearer hunter2", ["status"]) == 5
    assert ledger_row.stored_error("no access: password=hunter2") == "no access: password=[removed]"
    assert "hunter2" not in capsys.readouterr().err


def test_the_working_folder_is_no_secret(monkeypatch):
    monkeypatch.setenv("PWD", "/home/somebody")
    assert without_secrets("/home/dailies/out") == "/home/dailies/out"
