"""哪一列像 raw_orders 的哪一列：看表头的字，也看下面的值。只是提议，从不照着导入。"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

import polars as pl

from bridge.imports.files.cells import Source
from bridge.imports.orders.headers import HEADERS, fold_name
from bridge.imports.rules.profile import ROW_NUMBER, TARGETS

_ROWS = 1_000
# 低于这么像的不提
_ENOUGH = 0.4
_SIMILAR = 0.84

_TIME = re.compile(
    r"\d{4}\s*[-/.年]\s*\d{1,2}\s*[-/.月]\s*\d{1,2}.*"
    r"|\d{1,2}[-/. ](?:\d{1,2}|[A-Za-z]{3,9})[-/. ]\d{2,4}\b.*"
    r"|[A-Za-z]{3,9}[- ]\d{1,2}[-, ]+\d{2,4}\b.*"
)
_NUMBER = re.compile(r"[(+-]?\s*[^\d\s.,()+-]{0,4}\s*-?\d[\d.,' ]*\s*[^\d\s]{0,3}\)?")
_WHOLE = re.compile(r"\d{1,6}(?:\.0+)?")


@dataclass(frozen=True)
class _Words:
    """表头里的字：strong 几乎就是，weak 也许是，against 说明是别的东西。"""

    strong: str
    weak: str
    against: str

    def score(self, header: str, similarity: float) -> float:
        score = 0.9 if re.search(self.strong, header) else 0.5 if re.search(self.weak, header) else 0.0
        return max(score, similarity) - (0.45 if re.search(self.against, header) else 0.0)


_WORDS = {
    "order_id": _Words(
        r"order.?(id|no|n[ru]|num|#)|bestell.?(nummer|nr)|invoice.?(id|no|num)|订单(编?号|id)|訂單(編號|號)|注文番号|commande|pedido|^单号$",
        r"\bid\b|编号|編號|单号|number|nummer|番号|\bnr\b|\bno\b|^name$|order",
        r"item|sku|product|商品|货|tracking|物流|快递|运单|phone|手机|电话|zip|post|transaction|payment|支付|device|location|merchant|子订单|receipt"
        r"|date|time|status|total|note|customer|buyer|user",
    ),
    "shop": _Words(
        r"\b(shop|store)\b|店铺|店名|店舗|门店",
        r"seller|卖家|marketplace|channel|渠道",
        r"\bid\b|优惠|discount|note|voucher|coupon|credit",
    ),
    "customer_name": _Words(
        r"buyer|customer|client|买家|買家|客户|顾客|会员|用户|kunde|käufer|購入者|acheteur",
        r"\bname\b|e-?mail|收货人|收件人|收件者|recipient|receiver|nick|昵称|姓名",
        r"note|留言|备注|備註|phone|tel|电话|手机|address|地址|zip|product|item|商品|discount|shop|店|message|支付|province|city|country|type|paid|id$",
    ),
    "order_type": _Words(r"order.?type|订单类型|訂單類型", r"订单种类", r"payment|shipping|ship"),
    "order_status": _Words(
        r"order.?status|financial.?status|订单状态|訂單狀態|交易状态|^status$|^状态$",
        r"status|状态|狀態",
        r"after|退|售后|item|fulfil|risk|ship|tax",
    ),
    "amount": _Words(
        r"^total$|(order|grand|gesamt).?(total|betrag)|total.?(amount|price|paid)|实付|實付|应付金额|订单金额|总金额|支付金额|^betrag$|^金額$|^amount$|paid.?price",
        r"price|total|amount|sum\b|金额|金額|betrag|preis|netto|brutto|revenue|montant|importe|价",
        r"tax|ship|discount|refund|邮费|运费|運費|优惠|优免|退|折扣|单价|unit|lineitem|compare|fee|服务费|积分|subtotal|balance|名|date|time",
    ),
    "quantity": _Words(
        r"quantity|qty|数量|數量|menge|件数|个数|items.?sold|number.?of.?items|anzahl",
        r"count|items|pieces",
        r"refund|退|return|cancel|ship",
    ),
    "ordered_at": _Words(
        r"created|(order|purchase|sale)s?.?(date|time)|(下单|创建|提交|成交|成立)(时间|日期)|订单日期|注文日|bestelldatum|ordered",
        r"date|time|时间|日期|時間|datum|日時",
        r"ship|发货|出貨|deliver|完成|update|cancel|refund|promise|due|estimated|confirm|expir|收货|fulfil|zone|zip|paid",
    ),
}


@dataclass(frozen=True)
class ColumnSample:
    """一列开头的 rows 行：filled 是填了的份额，其余是填了的里面的份额。"""

    name: str
    rows: int
    filled: float
    times: float
    numbers: float
    whole: float
    decimals: float
    letters: float
    distinct: float


def propose_columns(source: Source, targets: Iterable[str] = TARGETS) -> dict[str, str]:
    """每个 target 最像的来源列；一列只提给最像的那个。"""
    samples = sample_columns(source)
    wanted = list(targets)
    ranked = sorted(
        ((_score(target, sample), target, sample.name) for target in wanted for sample in samples),
        key=lambda entry: entry[0],
        reverse=True,
    )
    found: dict[str, str] = {}
    for score, target, column in ranked:
        if score >= _ENOUGH and target not in found and column not in found.values():
            found[target] = column
    return found


def sample_columns(source: Source) -> list[ColumnSample]:
    block = next(iter(source.reread()), None)
    cells = block.cells.head(_ROWS) if block else pl.DataFrame()
    columns = [name for name in source.columns if name not in source.added and name != ROW_NUMBER]
    return [_sample(name, cells[name]) if cells.height else ColumnSample(name, 0, *[0.0] * 7) for name in columns]


def _sample(name: str, cells: pl.Series) -> ColumnSample:
    values = [value.strip() for value in cells.drop_nulls() if value.strip().strip("-—/")]

    def share(holds: Callable[[str], object]) -> float:
        return sum(bool(holds(value)) for value in values) / len(values) if values else 0.0

    return ColumnSample(
        name,
        cells.len(),
        len(values) / cells.len(),
        share(_TIME.fullmatch),
        share(lambda value: _NUMBER.fullmatch(value) and not _TIME.fullmatch(value)),
        share(_WHOLE.fullmatch),
        share(re.compile(r"[.,]\d{1,2}\D*").search),
        share(lambda value: any(character.isalpha() for character in value)),
        len(set(values)) / len(values) if values else 0.0,
    )


def _score(target: str, sample: ColumnSample) -> float:
    """名字的分，加减值的分；有值而值不可能的是 0。"""
    folded = fold_name(sample.name)
    named = 1.0 if folded in HEADERS[target] else _WORDS[target].score(folded, _similarity(target, folded))
    if not sample.rows:
        return named
    # 没有一个值的列（Shopify 的 Receipt Number）不提
    fits = _FITS[target](sample) if sample.filled else 0.0
    return named * (0.7 + 0.3 * fits) if fits else 0.0


def _similarity(target: str, folded: str) -> float:
    """打错了一两个字的常用名。"""
    best = max(SequenceMatcher(None, folded, name).ratio() for name in (*HEADERS[target], target.replace("_", " ")))
    return best if best >= _SIMILAR else 0.0


_FITS: dict[str, Callable[[ColumnSample], float]] = {
    "order_id": lambda column: 0.0 if column.times > 0.5 or column.decimals > 0.5 else 0.3 + 0.7 * column.distinct,
    "shop": lambda column: 0.0 if column.times > 0.5 or column.decimals > 0.5 else 1.0 - min(column.distinct, 0.9),
    "customer_name": lambda column: 0.0 if column.times > 0.5 else 0.3 + 0.7 * column.letters,
    "order_type": lambda column: 0.0 if column.times > 0.5 or column.numbers > 0.5 else 1.0 - min(column.distinct, 0.9),
    "order_status": lambda column: (
        0.0 if column.times > 0.5 or column.decimals > 0.5 else 1.0 - min(column.distinct, 0.9)
    ),
    "amount": lambda column: 0.0 if column.numbers < 0.5 else 0.6 + 0.4 * column.decimals,
    "quantity": lambda column: column.whole if column.whole >= 0.5 else 0.0,
    "ordered_at": lambda column: column.times if column.times >= 0.5 else 0.0,
}
