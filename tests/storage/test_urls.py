"""From URLs to stores."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tidemill.storage.errors import InvalidURL
from tidemill.storage.extras import MissingExtra
from tidemill.storage.urls import open_object, open_store


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("./x", "file://{here}/x"),
        ("x/y/", "file://{here}/x/y"),
        (".", "file://{here}"),
        ("../x", "file://{parent}/x"),
        ("~/x", "file://{home}/x"),
        ("with space/a%20b", "file://{here}/with space/a%20b"),
        ("/x", "file:///x"),
        ("file:///x/", "file:///x"),
        ("file://localhost/x", "file:///x"),
        ("s3://bucket", "s3://bucket"),
        ("S3://bucket/X", "s3://bucket/X"),
        ("./ends with a space ", "file://{here}/ends with a space "),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/pre/fix/", "s3://bucket/pre/fix"),
        ("s3://bucket/a b%20+", "s3://bucket/a b%20+"),
        ("gs://bucket/pre/fix/", "gs://bucket/pre/fix"),
        ("az://container/pre/fix", "az://container/pre/fix"),
        ("abfs://container/pre", "az://container/pre"),
        ("abfss://container@account.dfs.core.windows.net/pre/fix/", "az://container/pre/fix"),
        ("memory://name", "memory://name"),
        ("memory://name/prefix/", "memory://name/prefix"),
    ],
)
def test_the_canonical_url_opens_the_same_store(
    url: str, canonical: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)

    store = open_store(url)

    assert store.url == canonical.format(here=here, parent=tmp_path, home=tmp_path / "home")
    assert open_store(store.url).url == store.url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nul\0",
        "ftp://bucket/x",
        "http://host/x",
        "s3:/bucket/x",
        "memory:name",
        "s3://",
        "s3:///x",
        "file://host/x",
        "file://x",
        "s3://bucket//x",
        "s3://bucket/a/../b",
        "s3://bucket/a\\b",
        "s3://bucket/x?endpoint=y",
        "s3://bucket/x#y",
        " s3://bucket/x",
        "s3://bucket/x\n",
        "s3a://bucket/x",
        "minio://bucket/x",
        "https://s3.amazonaws.com/bucket/x",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/ap/x",
    ],
)
def test_what_names_no_store_is_refused_with_what_would(url: str):
    with pytest.raises(InvalidURL, match=r"s3://|three slashes"):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3a://bucket/x", "write s3://bucket/prefix"),
        ("https://minio.example/bucket", "AWS_ENDPOINT_URL_S3"),
        ("gcs://bucket/x", "write gs://bucket/prefix"),
        ("wasbs://c@account.blob.core.windows.net/x", "write az://container/prefix"),
        ("s3:///x", "no bucket"),
        ("s3://arn:aws:s3:eu-west-1:1:accesspoint/ap", "alias"),
        (" s3://bucket/x", "white space"),
    ],
)
def test_the_remedy_fits_the_url(url: str, told: str):
    with pytest.raises(InvalidURL, match=told):
        open_store(url)


def test_a_current_folder_that_is_gone_is_told(tmp_path: Path):
    code = """
import os
from tidemill.storage.errors import InvalidURL
from tidemill.storage.extras import MissingExtra
from tidemill.storage.urls import open_object, open_store
os.mkdir("gone")
os.chdir("gone")
os.rmdir(os.getcwd())
open_store("/whole/path")
try:
    open_store("./data")
except InvalidURL as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "'./data' is relative to the current folder, which is gone" in run.stdout


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA123:s3cr3t@bucket/x",
        "s3://s3cr3t@bucket",
        "gs://user:s3cr3t@bucket/x",
        "az://account:s3cr3t@container",
        "memory://user:s3cr3t@name",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str):
    with pytest.raises(InvalidURL, match="credentials or a port before the") as caught:
        open_store(url)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "client"),
    [("s3://bucket", "botocore"), ("gs://bucket", "google.cloud.storage"), ("az://container", "azure.storage.blob")],
)
def test_only_a_url_of_a_cloud_costs_the_import_of_its_client(url: str, client: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
    code = f"""
import sys
from tidemill.storage.urls import open_object, open_store
slow = {{"s3fs", "botocore", "google.cloud.storage", "azure.storage.blob", "azure.identity", "pyarrow"}}
open_store("x")
open_store("memory://x")
print(*(slow & {{*sys.modules}}))
open_store({url!r})
print(*(slow & {{*sys.modules}}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == f"\n{client}\n"


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("gs://bucket", "google.cloud.storage", "gcs"), ("az://container", "azure.storage.blob", "azure")],
)
def test_a_url_whose_packages_are_not_installed_names_the_extra(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("gcs", "gcs_errors", "azure", "azure_account", "azure_errors"):
        monkeypatch.delitem(sys.modules, f"tidemill.storage.{module}", raising=False)
    with pytest.raises(MissingExtra, match=rf"{url[:5]} needs the package .* pip install 'tidemill\[{extra}\]'"):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "variables", "told"),
    [
        ("az://container", {}, "set AZURE_STORAGE_ACCOUNT"),
        (
            "abfss://c@other.dfs.core.windows.net/x",
            {"AZURE_STORAGE_ACCOUNT": "account"},
            "'other', and the environment 'account'",
        ),
        (
            "abfss://c@other.dfs.core.windows.net/x",
            {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=account;AccountKey=czNjcjN0"},
            "'other', and the environment 'account'",
        ),
        (
            "abfss://c@other.dfs.core.windows.net/x",
            {
                "AZURE_STORAGE_CONNECTION_STRING": "BlobEndpoint=https://account.blob.core.windows.net/;SharedAccessSignature=czNjcjN0"
            },
            "'other', and the environment 'account'",
        ),
        (
            "abfss://c@other.dfs.core.windows.net/x",
            {"AZURE_STORAGE_CONNECTION_STRING": "BlobEndpoint=http://127.0.0.1:1/x;SharedAccessSignature=czNjcjN0"},
            "'other', and the environment does not tell the name of its own",
        ),
        (
            "abfss://c@evil.example/x",
            {"AZURE_STORAGE_ACCOUNT": "account"},
            "abfss://container@account.dfs.core.windows.net",
        ),
    ],
)
def test_all_places_in_azure_lie_in_the_account_of_the_environment(
    url: str, variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidURL, match=re.escape(told)) as caught:
        open_store(url)
    assert "czNjcjN0" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "root", "key"),
    [
        ("x.onnx", "file://{here}", "x.onnx"),
        ("./a b/x", "file://{here}/a b", "x"),
        ("~/x", "file://{home}", "x"),
        ("/x", "file:///", "x"),
        ("file:///a/x", "file:///a", "x"),
        ("file:///x", "file:///", "x"),
        ("s3://bucket/x", "s3://bucket", "x"),
        ("s3://bucket/pre/fix/x.onnx", "s3://bucket/pre/fix", "x.onnx"),
        ("memory://name/x", "memory://name", "x"),
    ],
)
def test_an_object_is_a_key_of_a_store(
    url: str, root: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    store, found = open_object(url)
    assert (store.url, found) == (root.format(here=tmp_path, home=tmp_path / "home"), key)


@pytest.mark.parametrize(
    "url", ["", ".", "..", "x/", "~", "./a/..", "s3://bucket", "s3://bucket/", "s3://", "memory://name"]
)
def test_a_folder_or_a_bucket_is_no_object(url: str) -> None:
    with pytest.raises(InvalidURL, match="names no file: give its name too"):
        open_object(url)


def test_an_account_is_known_by_the_endpoint_of_a_connection_with_a_signature(monkeypatch: pytest.MonkeyPatch):
    """As the portal of Azure makes it: without the name."""
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        "BlobEndpoint=https://account.blob.core.windows.net/;SharedAccessSignature=sv=x",
    )
    assert open_store("abfss://c@account.dfs.core.windows.net/x").url == "az://c/x"
