"""放量：哪些客户归这套 ETL 写（ETL_ROLLOUT）；同一个条件在 Polars 与 SQL 里各有一种写法。"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import sqlalchemy as sa
from polars_hash import col as hash_column
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.errors import SettingsError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import shop_configs

_WHOLE = 100
_UUID_LENGTH = 36


@dataclass(frozen=True)
class Share:
    """归我们写的客户：`shop_ids` 这些店的，或没有点名店铺时散列落在 `percent` 以内的。

    散列取 customer_key 的 md5 的前 8 个十六进制数字，模 100：哪台机器、哪个版本算出来都一样，小的份额总在大的里面。
    """

    percent: int = _WHOLE
    shop_ids: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """全部客户：什么也不必滤，也不该多发语句。"""
        return not self.shop_ids and self.percent >= _WHOLE

    def covers(self, key: str = "customer_key") -> pl.Expr:
        """Polars：这一列的 customer_key 在份额之内。"""
        if self.is_whole:
            return pl.lit(value=True)
        if self.shop_ids:
            return pl.col(key).str.head(_UUID_LENGTH).is_in(self.shop_ids)
        bucket = hash_column(key).nchash.md5().str.head(8).str.to_integer(base=16, dtype=pl.Int64) % 100
        return bucket < self.percent

    def covers_key(self, key: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
        """SQL：同样的条件；散列的是 UTF-8，不随数据库的编码变。"""
        if self.is_whole:
            return sa.true()
        if self.shop_ids:
            return sa.func.left(key, _UUID_LENGTH) == sa.any_(sa.cast(list(self.shop_ids), sa.ARRAY(sa.Text)))
        digits = sa.func.left(sa.func.md5(sa.func.convert_to(key, "UTF8")), 8)
        # bigint 装得下 32 位：转成 integer 有一半是负的，模就与 Polars 的不同
        number = sa.cast(sa.cast(sa.literal("x").concat(digits), pg.BIT(32)), sa.BigInteger)
        return number % 100 < self.percent


def read_share(connection: sa.Connection, settings: EtlSettings) -> Share:
    """设置里的份额；点了店名才查 shop_configs。

    :raises SettingsError: shop_configs 里没有点名的店。
    """
    rollout = settings.rollout
    if isinstance(rollout, int):
        return Share(percent=rollout)
    named = sa.select(shop_configs.c.shop_name, shop_configs.c.shop_id).where(shop_configs.c.shop_name.in_(rollout))
    shop_ids = {row.shop_name: str(row.shop_id) for row in connection.execute(named)}
    if unknown := [name for name in rollout if name not in shop_ids]:
        raise SettingsError(
            f"ETL_ROLLOUT names {', '.join(map(repr, unknown))}, which shop_configs does not have, so nothing was written: "
            "write the names as shop_configs has them, or add the shop, and run the days again"
        )
    return Share(percent=0, shop_ids=tuple(shop_ids.values()))
