"""真的证书：自己的签发者，签给谁、到什么时候，都由测试定。"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificate:
    cert: Path
    key: Path


class Authority:
    """一个签发者；`ca` 是它自己的证书。"""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, *hosts: str, expired: bool = False) -> Certificate:
        """:param name: 文件的名字，也是客户端证书里的名字；同一个名字再签一次就是换新的。"""
        now = datetime.now(UTC)
        until = now - timedelta(hours=1) if expired else now + timedelta(days=1)
        issued = self._authority.issue_cert(
            *(hosts or ("127.0.0.1",)), common_name=name, not_before=now - timedelta(days=2), not_after=until
        )
        found = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(found.cert)
        issued.private_key_pem.write_to_path(found.key)
        found.key.chmod(0o600)
        return found
