"""表头的名字：raw_orders 各列的常用名，与按名字找一列。"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

# 淘宝、天猫、京东、抖音导出的表头；一个文件里有好几个时取前面的
HEADERS: dict[str, tuple[str, ...]] = {
    "order_id": ("order_id", "订单编号", "订单号", "主订单编号", "order id", "order number"),
    "shop": ("shop", "店铺名称", "店铺", "店铺名", "shop name", "store"),
    "customer_name": (
        "customer_name",
        "买家会员名",
        "买家昵称",
        "客户名称",
        "客户昵称",
        "下单帐号",
        "下单账号",
        "用户昵称",
        "买家",
        "客户",
    ),
    "order_type": ("order_type", "订单类型"),
    "order_status": ("order_status", "订单状态", "交易状态"),
    "amount": (
        "amount",
        "实付金额",
        "买家实际支付金额",
        "买家实付金额",
        "订单应付金额",
        "应付金额",
        "订单金额",
        "总金额",
        "金额",
    ),
    "quantity": ("quantity", "数量", "宝贝总数量", "商品总数量", "商品数量", "订购数量", "购买数量"),
    "ordered_at": ("ordered_at", "下单时间", "订单创建时间", "订单提交时间", "创建时间", "付款时间", "订单付款时间"),
}


def fold_name(name: str) -> str:
    """比较名字用：不分大小写、全角半角（实付款（元）与 实付款(元)）、两边的空白。"""
    return unicodedata.normalize("NFKC", name).strip().casefold()


def find_column(columns: Iterable[str], wanted: str) -> str | None:
    """先按原样找，再不分大小写与全角半角找；好几个像的就是没有。"""
    columns = list(columns)
    if wanted in columns:
        return wanted
    folded = [column for column in columns if fold_name(column) == fold_name(wanted)]
    return folded[0] if len(folded) == 1 else None
