"""客户的身份：customer_key 与由它得出的 id。全项目只在这里计算。"""

from __future__ import annotations

import polars as pl
from polars_hash import col as hash_column

# DOMAIN 第 4 节定的：改了它，每个客户、每个商机都换了 id
NAMESPACE = "93722013-60cb-5739-97f7-f0fc989b5a59"


def customer_key(shop_id: str = "shop_id", nickname: str = "customer_nickname") -> pl.Expr:
    """shop_id（小写带连字符）+ ":" + 昵称（NFKC、修剪、内部空白折成一个空格）。"""
    normalized = pl.col(nickname).str.normalize("NFKC").str.strip_chars().str.replace_all(r"\s+", " ")
    return pl.concat_str(pl.col(shop_id), pl.lit(":"), normalized).alias("customer_key")


def nickname_of_key(key: str = "customer_key") -> pl.Expr:
    """customer_key 里的名字部分。"""
    # 只在第一个冒号处切：昵称里也可以有冒号，shop_id 里没有
    return pl.col(key).str.splitn(":", 2).struct.field("field_1")


def customer_id(key: str = "customer_key") -> pl.Expr:
    """UUIDv5(customer_key)。"""
    return hash_column(key).uuidhash.uuid5(NAMESPACE)


def with_lead_ids(leads: pl.DataFrame) -> pl.DataFrame:
    """加一列 lead_id：UUIDv5(customer_key + "#" + lead_no)；输入一行一个商机。"""
    named = leads.with_columns(lead_name=pl.concat_str("customer_key", pl.lit("#"), pl.col("lead_no").cast(pl.String)))
    return named.with_columns(lead_id=hash_column("lead_name").uuidhash.uuid5(NAMESPACE)).drop("lead_name")
