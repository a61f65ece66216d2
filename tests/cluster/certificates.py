"""The cluster's own certificate authority, and kubeconfig files made with it."""

from __future__ import annotations

import base64
import datetime
import ipaddress
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# A cluster lives for minutes to days. A year also covers one that a developer forgets.
_VALID_FOR = datetime.timedelta(days=365)


class Authority:
    """Issues certificates into one folder; made anew on every start of a cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _subject("tunewright-test-cluster", None)
        builder = _builder(self._name, self._name, self._key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.certificate = folder / "ca.crt"
        self.certificate.write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))

    def issue(
        self, file: str, common_name: str, organization: str | None = None, addresses: tuple[str, ...] = ()
    ) -> tuple[Path, Path]:
        """Writes a certificate for servers and clients alike; returns its path and that of its key.

        Args:
            file: file name without extension.
            common_name: the user name, for Kubernetes.
            organization: the group, for Kubernetes.
            addresses: IP addresses and host names under which a server with this certificate is reached.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_subject(common_name, organization), self._name, key.public_key())
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(usage, critical=False)
        if addresses:
            names = x509.SubjectAlternativeName([_general_name(address) for address in addresses])
            builder = builder.add_extension(names, critical=False)
        certificate_path = self.folder / f"{file}.crt"
        certificate_path.write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))
        key_path = self.folder / f"{file}.key"
        _write_secret(key_path, _private_pem(key))
        return certificate_path, key_path

    def service_account_keys(self) -> tuple[Path, Path]:
        """Writes the key pair that signs service account tokens; returns the paths (public, private)."""
        key = ec.generate_private_key(ec.SECP256R1())
        public, private = self.folder / "service-accounts.pub", self.folder / "service-accounts.key"
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
        _write_secret(private, _private_pem(key))
        return public, private

    def kubeconfig(self, path: Path, server: str, user: str, group: str | None = None) -> Path:
        """Writes a kubeconfig at `path` for a new client certificate of `user`; it carries all it needs inside."""
        certificate, key = self.issue(path.stem, user, group)
        cluster = {"server": server, "certificate-authority-data": _encoded(self.certificate)}
        identity = {"client-certificate-data": _encoded(certificate), "client-key-data": _encoded(key)}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tunewright", "cluster": cluster}],
            "users": [{"name": user, "user": identity}],
            "contexts": [{"name": "tunewright", "context": {"cluster": "tunewright", "user": user}}],
            "current-context": "tunewright",
        }
        _write_secret(path, yaml.safe_dump(document).encode())
        return path


def _subject(common_name: str, organization: str | None) -> x509.Name:
    names = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organization is not None:
        names.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(names)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # An hour back: a certificate made this second is not yet valid for a process that rounds its clock down.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + _VALID_FOR)
    )


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form, encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, encryption)


def _write_secret(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
