"""`[server.tls]` in a file: what it gives, and what is said about files that cannot serve."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from canal_trio.cli import cli
from canal_trio.config import Flags, load
from canal_trio.config.values import server_name
from canal_trio.errors import ConfigError
from canal_trio.settings import NamedCertificate, ServerTLS

MINIMAL = '[[upstream]]\nname = "a"\nbase_url = "http://127.0.0.1:1/v1"\n'
TLS = '[server.tls]\ncertificate = "one.pem"\nkey = "one.key"\n'
AUTHORITY = trustme.CA()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pairs of files, `one` and `two`."""
    for name in ("one", "two"):
        leaf = AUTHORITY.issue_cert(f"{name}.test")
        (tmp_path / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        (tmp_path / f"{name}.key").write_bytes(leaf.private_key_pem.bytes())
    return tmp_path


def written(folder: Path, text: str) -> Flags:
    """A configuration in that folder."""
    (folder / "canal.toml").write_text(text)
    return Flags(config=str(folder / "canal.toml"))


def complaint(folder: Path, text: str) -> list[str]:
    """What is said about it, without the folder's name."""
    with pytest.raises(ConfigError) as caught:
        load(written(folder, text), {})
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_the_files_stand_beside_the_configuration(folder: Path) -> None:
    """Relative paths start from the file's folder, absolute ones do not; names lose case and last dot."""
    names = 'names = ["Two.test.", "*.two.test"]'
    sni = f'[[server.tls.sni]]\n{names}\ncertificate = "{folder}/two.pem"\nkey = "two.key"\n'
    settings = load(written(folder, TLS + sni + MINIMAL), {})
    two = NamedCertificate(("two.test", "*.two.test"), f"{folder}/two.pem", f"{folder}/two.key")
    assert settings.tls == ServerTLS(f"{folder}/one.pem", f"{folder}/one.key", (two,))


def test_check_reads_the_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`canal-trio check` is content with good ones, and names a missing one."""
    written(folder, TLS + MINIMAL)
    assert cli.main(["check", str(folder / "canal.toml")], standalone_mode=False) is None
    assert "ok" in capsys.readouterr().out
    (folder / "one.pem").unlink()
    with pytest.raises(ConfigError, match=r":2: server\.tls\.certificate: cannot read '.*one\.pem': No such file"):
        cli.main(["check", str(folder / "canal.toml")], standalone_mode=False)


def test_a_missing_key_is_a_missing_key(folder: Path) -> None:
    """A table without one of its two files."""
    assert complaint(folder, MINIMAL + '[server.tls]\ncertificate = "one.pem"\n') == [
        "canal.toml:4: server.tls: the key 'key' is missing"
    ]


CLIENTS = 'client_ca = "clients.pem"\n'
NO_AUTHORITY = "canal.toml:4: server.tls.client_ca: expected a file with an authority's certificates; of "


def test_certificates_of_clients(folder: Path) -> None:
    """With an authority every client needs one, unless something else is said; without it nobody is asked."""
    AUTHORITY.cert_pem.write_to_path(str(folder / "clients.pem"))
    for text, expected in (
        ("", (None, "none")),
        ('client_auth = "none"\n', (None, "none")),
        (CLIENTS, (f"{folder}/clients.pem", "required")),
        (CLIENTS + 'client_auth = "optional"\n', (f"{folder}/clients.pem", "optional")),
        (CLIENTS + 'client_auth = "none"\n', (f"{folder}/clients.pem", "none")),
    ):
        tls = load(written(folder, TLS + text + MINIMAL), {}).tls
        assert tls is not None
        assert (tls.client_ca, tls.client_auth) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'client_auth = "require"\n',
            "canal.toml:4: server.tls.client_auth: expected 'none', 'optional' or 'required', got 'require'",
        ),
        (
            'client_auth = "optional"\n',
            "canal.toml:4: server.tls.client_auth: 'optional' needs client_ca, a file with the authority whose "
            "certificates are believed",
        ),
        (CLIENTS, "canal.toml:4: server.tls.client_ca: cannot read 'clients.pem': No such file or directory"),
        ('client_ca = "one.key"\n', f"{NO_AUTHORITY}'one.key': there are no PEM certificates in it"),
        ('client_ca = "one.der"\n', f"{NO_AUTHORITY}'one.der': there are no PEM certificates in it"),
        ('client_ca = "one.pem"\n', f"{NO_AUTHORITY}'one.pem': none of its certificates is an authority's"),
    ],
)
def test_authorities_that_cannot_be_used(folder: Path, text: str, said: str) -> None:
    """Each fault names the key and its line, and what was expected."""
    (folder / "one.der").write_bytes(b"\x30\x82\xff")
    assert complaint(folder, TLS + text + MINIMAL) == [said]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("mismatch", "canal.toml:3: server.tls.key: expected the key of the first certificate in 'one.pem'; "
                     "'one.key' holds another one"),
        ("encrypted", "canal.toml:3: server.tls.key: the key in 'one.key' is encrypted; expected a key without a "
                      "passphrase, as 'openssl pkey -in OLD -out NEW' writes it"),
        ("traditional", "canal.toml:3: server.tls.key: the key in 'one.key' is encrypted; expected a key without a "
                        "passphrase, as 'openssl pkey -in OLD -out NEW' writes it"),
        ("no key", "canal.toml:3: server.tls.key: expected a file with a PEM private key; 'one.key' has none"),
        ("key gone", "canal.toml:3: server.tls.key: cannot read 'one.key': No such file or directory"),
        ("no certificate", "canal.toml:2: server.tls.certificate: expected a file with PEM certificates; "
                           "'one.pem' has none"),
        ("folder", "canal.toml:2: server.tls.certificate: cannot read 'one.pem': Is a directory"),
        ("too large", "canal.toml:2: server.tls.certificate: 'one.pem' is larger than 1048576 bytes: "
                      "expected a PEM file"),
        ("damaged", "canal.toml:2: server.tls.certificate: 'one.pem' and 'one.key' cannot be used: "),
        ("weak", "canal.toml:2: server.tls.certificate: 'one.pem' is too weak to be used: ee key too small"),
    ],
)  # fmt: skip
def test_files_that_cannot_serve(folder: Path, spoil: str, said: str) -> None:
    """Each fault names the file, the key and the line, and what was expected."""
    certificate, key = folder / "one.pem", folder / "one.key"
    secret = serialization.load_pem_private_key(key.read_bytes(), None)
    match spoil:
        case "mismatch":
            key.write_bytes((folder / "two.key").read_bytes())
        case "encrypted" | "traditional":
            modern, old = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL
            hidden = serialization.BestAvailableEncryption(b"secret")
            form = modern if spoil == "encrypted" else old
            key.write_bytes(secret.private_bytes(serialization.Encoding.PEM, form, hidden))
        case "no key":
            key.write_bytes(certificate.read_bytes())
        case "key gone":
            key.unlink()
        case "no certificate":
            certificate.write_bytes(key.read_bytes())
        case "folder":
            certificate.unlink()
            certificate.mkdir()
        case "too large":
            certificate.write_bytes(b"x" * (1 << 21))
        case "damaged":
            certificate.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        case "weak":
            weak(certificate, key)
    [line] = complaint(folder, TLS + MINIMAL)
    assert line == said or (said.endswith(" ") and line.startswith(said))


def weak(certificate: Path, key: Path) -> None:
    """A certificate with a key of 1024 bits, signed by itself."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import rsa

    secret = rsa.generate_private_key(65537, 1024)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "weak.test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(secret.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(secret, hashes.SHA256())
    )
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    key.write_bytes(secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))


def test_names_of_further_certificates(folder: Path) -> None:
    """None, no names, twice the same, an address: each is told; so is a file that is not there."""
    pair = 'certificate = "two.pem"\nkey = "two.key"\n'
    text = (
        f"{TLS}[[server.tls.sni]]\nnames = []\n{pair}"
        f'[[server.tls.sni]]\nnames = ["two.test", "10.0.0.1"]\n{pair}'
        '[[server.tls.sni]]\nnames = ["TWO.test"]\ncertificate = "three.pem"\nkey = "two.key"\n'
    )
    assert complaint(folder, text + MINIMAL) == [
        "canal.toml:5: server.tls.sni[0].names: expected at least one host name, got an empty list",
        "canal.toml:9: server.tls.sni[1].names[1]: expected a host name such as api.example.org or *.example.org, got "
        "'10.0.0.1': an address is never asked for, it gets the default one",
        "canal.toml:13: server.tls.sni[2].names[0]: 'TWO.test' is named already, in server.tls.sni[1]",
        "canal.toml:14: server.tls.sni[2].certificate: cannot read 'three.pem': No such file or directory",
    ]


@pytest.mark.parametrize("text", ["", "*", "*.", "a b", "*.*.a", "a.*", "ä.test", "-a.test", "a..b", "x" * 64, "a/b"])
def test_what_is_no_name(text: str) -> None:
    """A wildcard stands for the first label only, and everything is ASCII."""
    with pytest.raises(ValueError, match="expected a host name"):
        server_name(text)
