"""全部测试共用的夹具：就是提供给用户的那一套。"""

from __future__ import annotations

pytest_plugins = ["etl_assets.testing.fixtures"]
