"""With a certificate, each video carries a manifest that the library itself finds valid."""

import dataclasses
import datetime
import json

import pytest

from worker import credentials, scratch, video
from worker.settings import WorkerSettings

c2pa = pytest.importorskip("c2pa")
x509 = pytest.importorskip("cryptography.x509")
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def name_of(common_name):
    parts = [("2.5.4.10", "Rushes test"), ("2.5.4.3", common_name)]
    return x509.Name([x509.NameAttribute(x509.ObjectIdentifier(oid), text) for oid, text in parts])


def certificate(subject, key, *, issuer, issuer_key, usages):
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name_of(subject))
        .issuer_name(name_of(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=9))
        .add_extension(x509.BasicConstraints(subject == issuer, None), critical=True)
        .add_extension(x509.KeyUsage(**{use: use in usages for use in USAGES}), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
        )
    )
    if subject != issuer:
        email = x509.ObjectIdentifier("1.3.6.1.5.5.7.3.4")
        made = made.add_extension(x509.ExtendedKeyUsage([email]), critical=False)
    signed = made.sign(issuer_key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def signing(tmp_path, monkeypatch):
    """Settings with a chain that was made for this test; the folder that it lies in."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = {"issuer": "root", "issuer_key": root_key}
    chain = certificate("signer", key, **root, usages={"digital_signature"})
    chain += certificate("root", root_key, **root, usages={"key_cert_sign"})
    (tmp_path / "chain.pem").write_bytes(chain)
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    monkeypatch.setenv("RUSHES_C2PA_CERTIFICATE", str(tmp_path / "chain.pem"))
    monkeypatch.setenv("RUSHES_C2PA_KEY", str(tmp_path / "key.pem"))
    return tmp_path


def test_a_signed_video_is_valid_plays_and_says_what_made_it(host, signing):
    runner = host.runner()
    signer = credentials.load(WorkerSettings())
    runner = dataclasses.replace(
        runner, renderer=dataclasses.replace(runner.renderer, credentials=signer)
    )
    job = host.submit()[0]
    runner.run_attempt(job.id)
    (folder,) = scratch.folders(host.config.scratch_dir)
    assert video.probe(folder.video).num_frames == 9
    assert {path.name for path in folder.path.iterdir()} == {"video.mp4", "sidecar.json"}
    told = json.loads(c2pa.Reader(folder.video).json())
    manifest = told["manifests"][told["active_manifest"]]
    (action,) = next(
        each["data"]["actions"]
        for each in manifest["assertions"]
        if each["label"].startswith("c2pa.actions")
    )
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert manifest["title"] == f"{job.batch_id}/{job.id}"
    assert manifest["signature_info"]["common_name"] == "signer"
    # Of the test's own root nobody has heard; all else is well.
    assert [each["code"] for each in told["validation_status"]] == ["signingCredential.untrusted"]
    assert repr(signer).count("PEM") == repr(signer).count("PRIVATE") == 0


def test_what_is_changed_afterwards_is_found_out(host, signing):
    runner = host.runner()
    signer = credentials.load(WorkerSettings())
    host.runner(renderer=dataclasses.replace(runner.renderer, credentials=signer)).run_attempt(
        host.submit()[0].id
    )
    (folder,) = scratch.folders(host.config.scratch_dir)
    data = bytearray(folder.video.read_bytes())
    data[data.index(b"mdat") + 40] ^= 1
    folder.video.write_bytes(data)
    codes = {
        each["code"] for each in json.loads(c2pa.Reader(folder.video).json())["validation_status"]
    }
    assert "assertion.bmffHash.mismatch" in codes


def test_a_certificate_that_cannot_be_used_is_told_at_the_start(signing, monkeypatch):
    (signing / "key.pem").write_text("no key")
    with pytest.raises(Exception, match="RUSHES_C2PA_CERTIFICATE or RUSHES_C2PA_KEY"):
        credentials.load(WorkerSettings())
    monkeypatch.delenv("RUSHES_C2PA_KEY")
    with pytest.raises(Exception, match="belong together"):
        credentials.load(WorkerSettings())


def test_without_a_certificate_nothing_is_signed():
    assert credentials.load(WorkerSettings()) is None
