"""各平台导出的文件，由订单写成：表头是真的，名字与数是编的。写法只照平台的样子，不看随包的配置。"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from random import Random
from xml.sax.saxutils import escape
from zoneinfo import ZoneInfo

Row = dict[str, str]
# order_id、customer_name、order_status、amount、quantity、ordered_at
Expected = tuple[str, str, str | None, Decimal | None, int | None, datetime]
CHINA = "Asia/Shanghai"
# 一行一个平台：名字，表头
with (Path(__file__).parents[1] / "exports" / "headers.csv").open(encoding="utf-8", newline="") as _file:
    HEADERS = {name: header for name, *header in csv.reader(_file)}
BELOW = "\r\n2,record(s) downloaded,from Jul-01-26 to Jul-31-26\r\nSeller ID : invented_shop\r\n"


@dataclass(frozen=True)
class Line:
    """一件商品；counts：没有单独关闭、退掉。"""

    title: str
    price: Decimal
    quantity: int
    counts: bool = True


@dataclass(frozen=True)
class Order:
    """state 是 Shape.states 里的第几个；at 是文件那里的当地时刻。"""

    number: int
    customer: str
    state: int
    at: datetime
    lines: Sequence[Line]
    shipping: Decimal = Decimal(0)

    @property
    def counted(self) -> Sequence[Line]:
        return [line for line in self.lines if line.counts] or self.lines

    @property
    def total(self) -> Decimal:
        return sum((line.price for line in self.lines), Decimal(0))

    @property
    def pieces(self) -> int:
        return sum(line.quantity for line in self.lines)


@dataclass(frozen=True)
class Shape:
    """一个平台的文件。

    :param states: 平台的叫法 → 该存成的；没有状态的文件是 {"": None}。
    :param rows: 一单的各行；没有写到的列由 write 随便填。
    :param expect: 该读成的金额与件数。
    :param precise: 时刻写到 second、minute 还是 day。
    :param several: 一单可以有几行。
    :param single_closed: 单独的一行可以关闭。
    """

    profile: str
    header: Sequence[str]
    states: Mapping[str, str | None]
    rows: Callable[[Order, str], list[Row]]
    expect: Callable[[Order], tuple[Decimal | None, int | None]]
    number: str = "{}"
    customer: str = "customer"
    time_zone: str = CHINA
    precise: str = "second"
    several: bool = True
    single_closed: bool = False
    shuffled: bool = False
    separator: str = ","
    encoding: str = "utf-8-sig"
    framed: bool = False
    never: frozenset[str] = frozenset()
    closed_state: str | None = None

    def expected(self, order: Order) -> Expected:
        number = self.number.format(order.number)
        at = order.at.replace(tzinfo=ZoneInfo(self.time_zone)).astimezone(UTC)
        all_closed = self.single_closed and not any(line.counts for line in order.lines)
        state = self.closed_state if all_closed else list(self.states.values())[order.state]
        return (number, number if self.customer == "order" else order.customer, state, *self.expect(order), at)

    def write(self, orders: Iterable[Order], seed: int = 0) -> bytes:
        """文本文件；framed 的是 eBay 那样的：表头上下各一行空的，末尾有几句话。"""
        table = self.table(orders, seed)
        blank = [[""] * len(self.header)] if self.framed else []
        return (self._text([*blank, table[0], *blank, *table[1:]]) + (BELOW if self.framed else "")).encode(
            self.encoding
        )

    def table(self, orders: Iterable[Order], seed: int = 0) -> list[list[str]]:
        """表头与各行；没有写到的列有时空着，有时是别的东西。"""
        random = Random(seed)  # noqa: S311  # 只是填充
        rows = [row for order in orders for row in self.rows(order, self.number.format(order.number))]
        if self.shuffled:
            random.shuffle(rows)
        filled = [[row[name] if name in row else self._fill(name, random) for name in self.header] for row in rows]
        return [list(self.header), *filled]

    def _fill(self, name: str, random: Random) -> str:
        return "" if name in self.never else random.choice(["", "", "0", "x 1", "备注", "2020-01-01 00:00:00"])

    def _text(self, table: list[list[str]]) -> str:
        if self.separator == "\t":
            return "".join("\t".join(row) + "\r\n" for row in table)
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\r\n").writerows(table)
        return buffer.getvalue()


def _cell(text: str) -> str:
    return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(text)}</t></is></c>' if text else "<c/>"


def write_workbook(path: Path, table: Sequence[Sequence[str]], merges: Sequence[str] = ()) -> Path:
    """最小的 xlsx：都是文字；merges 如 A2:A3。"""
    rows = "".join(f"<row>{''.join(map(_cell, row))}</row>" for row in table)
    refs = "".join(f'<mergeCell ref="{ref}"/>' for ref in merges)
    merged = f'<mergeCells count="{len(merges)}">{refs}</mergeCells>' if merges else ""
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    packed = "http://schemas.openxmlformats.org/package/2006/relationships"
    parts = {
        "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{packed}"><Relationship Id="r1" Type="{office}/officeDocument" Target="xl/workbook.xml"/>'
        "</Relationships>",
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>'
        '<sheet name="sheet1" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{packed}"><Relationship Id="r1" Type="{office}/worksheet" Target="s1.xml"/>'
        "</Relationships>",
        "xl/s1.xml": f'<worksheet xmlns="{main}"><sheetData>{rows}</sheetData>{merged}</worksheet>',
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in parts.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return path


def _plain(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S")


def _whole(order: Order) -> tuple[Decimal, int]:
    return order.total, order.pieces


def _counted(order: Order) -> tuple[Decimal, int]:
    return sum((line.price for line in order.counted), Decimal(0)), sum(line.quantity for line in order.counted)


def _dollars(amount: Decimal) -> str:
    return f"${amount:,.2f}"


def _taobao(order: Order, number: str) -> list[Row]:
    money = {
        name: f"{order.total + more:.2f}" for more, name in enumerate(("买家实际支付金额", "买家应付货款", "总金额"))
    }
    row = {
        "订单编号": f'="{number}"',
        "买家会员名": order.customer,
        "订单状态": ("等待买家付款", "买家已付款，等待卖家发货", "交易成功", "交易关闭")[order.state],
        "收货地址 ": "某省 某市, 某路 1 号",
        "订单创建时间": _plain(order.at),
        "宝贝标题 ": order.lines[0].title,
        "宝贝总数量": str(order.pieces),
        "店铺名称": "某某旗舰店",
    }
    return [{**money, **row}]


def _jd(order: Order, number: str) -> list[Row]:
    state = ("等待出库", "等待确认收货", "完成", "(删除)等待出库", "已取消", "(锁定)等待出库")[order.state]
    whole = {name: f"{order.total + more:.2f}" for more, name in enumerate(("应付金额", "结算金额", "订单金额"))}
    shared = {
        **whole,
        "订单号": number,
        "下单时间": _plain(order.at),
        "订单状态": state,
        "订单类型": "销售订单",
        "下单帐号": order.customer,
    }
    return [
        {**shared, "商品名称": line.title, "订购数量": str(line.quantity), "京东价": f"{line.price:.2f}"}
        for line in order.lines
    ]


def _pinduoduo(order: Order, number: str) -> list[Row]:
    state, after = (
        ("待发货", "无售后或售后取消"),
        ("已收货", "无售后或售后取消"),
        ("已收货", "退款成功"),
        ("已发货，退款成功", ""),
        ("已取消", "无售后或售后取消"),
        ("已收货", "部分退款成功"),
    )[order.state]
    return [
        {
            "商品": order.lines[0].title,
            "订单号": f"{number}\t",
            "订单状态": state,
            "售后状态": after,
            "用户实付金额(元)": f"{order.total / 2:.2f}\t",
            "商家实收金额(元)": f"{order.total:.2f}\t",
            "商品数量(件)": f"{order.pieces}\t",
            "订单成交时间": _plain(order.at),
        }
    ]


def _douyin(order: Order, number: str) -> list[Row]:
    state = ("待发货", "已发货", "已完成")[order.state]
    return [
        {
            "主订单编号": f"\t{number}",
            "子订单编号": f"\t{number}{position}",
            "选购商品": f"\t{line.title}",
            "商品数量": str(line.quantity),
            "订单应付金额": f"{line.price:.2f}",
            "收件人": order.customer,
            "订单提交时间": _plain(order.at),
            "订单状态": state if line.counts else "已关闭",
            "售后状态": "-",
        }
        for position, line in enumerate(order.lines)
    ]


def _alibaba(order: Order, number: str) -> list[Row]:
    first = {
        "订单编号": number,
        "买家公司名": "某某有限公司",
        "买家会员名": order.customer,
        "货品总价(元)": f"{order.total:.2f}",
        "实付款(元)": f"{order.total + order.shipping:.2f}",
        "订单状态": ("等待买家付款", "等待卖家发货", "交易成功", "交易关闭")[order.state],
        "订单创建时间": _plain(order.at),
    }
    blank = dict.fromkeys(first, "")
    return [
        {**(blank if position else first), "货品标题": line.title, "数量": str(line.quantity), "单位": "件"}
        for position, line in enumerate(order.lines)
    ]


def _xiaohongshu(order: Order, number: str) -> list[Row]:
    return [
        {
            "订单号": number,
            "订单状态": ("待配货", "已发货", "已完成")[order.state],
            "售后状态": "无售后" if line.counts else "退款成功",
            "SKU件数": str(line.quantity),
            "商家应收金额(元)（支付金额）": f"{line.price:.2f}",
            "用户编号": order.customer,
            "收件人姓名": "周*",
            "订单创建时间": _plain(order.at),
            "店铺名称": "某某的店",
        }
        for line in order.lines
    ]


def _youzan(order: Order, number: str) -> list[Row]:
    state, refund = (
        ("待发货", ""),
        ("交易完成", ""),
        ("交易关闭", ""),
        ("交易完成", "全额退款成功"),
        ("交易完成", "部分退款成功"),
    )[order.state]
    return [
        {
            "订单号": number,
            "归属店铺": "某某商城",
            "订单状态": state,
            "订单退款状态": refund,
            "订单创建时间": _plain(order.at),
            "订单实付金额": f"{order.total:.2f}",
            "全部商品名称": "；".join(line.title for line in order.lines),
            "商品种类数": str(len(order.lines)),
            "应收订单金额": f"{order.total + 1:.2f}",
            "买家昵称": order.customer,
        }
    ]


def _shopify(order: Order, number: str) -> list[Row]:
    financial, fulfilled, cancelled = (
        ("paid", "unfulfilled", ""),
        ("paid", "fulfilled", ""),
        ("pending", "unfulfilled", ""),
        ("refunded", "fulfilled", ""),
        ("voided", "unfulfilled", ""),
        ("paid", "unfulfilled", "2026-07-01 10:00:00 -0700"),
        ("partially_refunded", "fulfilled", ""),
    )[order.state]
    at = order.at.replace(tzinfo=ZoneInfo("America/Los_Angeles")).strftime("%Y-%m-%d %H:%M:%S %z")
    first = {
        "Financial Status": financial,
        "Fulfillment Status": fulfilled,
        "Cancelled at": cancelled,
        "Total": f"{order.total:.2f}",
        "Subtotal": f"{order.total + 1:.2f}",
        "Billing Name": order.customer,
        "Notes": 'said: "thanks",\nand came back',
    }
    return [
        {
            **(dict.fromkeys(first, "") if position else first),
            "Name": number,
            "Email": "",
            "Phone": "",
            "Created at": at,
            "Lineitem quantity": str(line.quantity),
            "Lineitem name": line.title,
            "Lineitem price": f"{line.price:.2f}",
        }
        for position, line in enumerate(order.lines)
    ]


WOOCOMMERCE_STATES = {
    "completed": "completed",
    "processing": "processing",
    "cancelled": "cancelled",
    "Failed": "cancelled",
    "on-hold": "on-hold",
}


def _woocommerce(order: Order, number: str) -> list[Row]:
    return [
        {
            "Date": _plain(order.at),
            "Order #": number,
            "N. Revenue (formatted)": _dollars(order.total + 1),
            "Status": list(WOOCOMMERCE_STATES)[order.state],
            "Customer": order.customer,
            "Product(s)": ", ".join(f"{line.quantity}× {line.title}" for line in order.lines),
            "Items sold": str(order.pieces),
            "Net Sales": f"{order.total:.2f}",
        }
    ]


def _woocommerce_lines(order: Order, number: str) -> list[Row]:
    shared = {
        "Order Number": number,
        "Order Status": list(WOOCOMMERCE_STATES)[order.state],
        "Order Date": order.at.strftime("%Y-%m-%d %H:%M"),
        "First Name (Billing)": "Ada",
        "Last Name (Billing)": "L.",
        "Email (Billing)": order.customer,
        "Order Total Amount": f"{order.total + order.shipping:.2f}",
    }
    return [
        {**shared, "Item Name": line.title, "Quantity": str(line.quantity), "Item Cost": f"{line.price:.2f}"}
        for line in order.lines
    ]


AMAZON_ORDERS = (
    "order-id,order-item-id,purchase-date,payments-date,buyer-email,buyer-name,buyer-phone-number,sku,product-name,quantity-purchased,currency,item-price,item-tax,shipping-price,shipping-tax,ship-service-level,recipient-name,"
    "ship-address-1,ship-address-2,ship-address-3,ship-city,ship-state,ship-postal-code,ship-country,ship-phone-number,delivery-start-date,delivery-end-date,delivery-time-zone,delivery-Instructions,sales-channel"
)
AMAZON_STATES = {
    "Shipped": "Shipped",
    "Pending": "Pending",
    "Cancelled": "Cancelled",
    "Shipped - Delivered to Buyer": "delivered",
}
AMAZON_NEVER = frozenset({"item-promotion-discount", "ship-promotion-discount", "item-status", "order-status"})


def _amazon_all(channel: str) -> Callable[[Order, str], list[Row]]:
    def rows(order: Order, number: str) -> list[Row]:
        return [
            {
                "amazon-order-id": number,
                "purchase-date": order.at.strftime("%Y-%m-%dT%H:%M:%S+00:00"),
                "order-status": list(AMAZON_STATES)[order.state],
                "sales-channel": channel,
                "product-name": line.title.replace("\n", " "),
                "item-status": "Shipped" if line.counts else "Cancelled",
                "quantity": str(line.quantity),
                "item-price": f"{line.price + 1:.2f}",
                "shipping-price": "" if position else f"{order.shipping:.2f}",
                "item-promotion-discount": "1.00" if position % 2 else "-1.00",
            }
            for position, line in enumerate(order.lines)
        ]

    return rows


def _amazon_all_expected(order: Order) -> tuple[Decimal, int]:
    amount, pieces = _counted(order)
    return amount + (order.shipping if order.counted[0] is order.lines[0] else 0), pieces


def _amazon_orders(order: Order, number: str) -> list[Row]:
    return [
        {
            "order-id": number,
            "purchase-date": order.at.strftime("%Y-%m-%dT%H:%M:%S+09:00"),
            "buyer-name": order.customer,
            "product-name": line.title.replace("\n", " "),
            "quantity-purchased": str(line.quantity),
            "item-price": str(line.price.to_integral_value()),
            "shipping-price": "0" if position else str(order.shipping.to_integral_value()),
            "sales-channel": "Amazon.co.jp",
        }
        for position, line in enumerate(order.lines)
    ]


def _amazon_orders_expected(order: Order) -> tuple[Decimal, int]:
    return sum(
        (line.price.to_integral_value() for line in order.lines), order.shipping.to_integral_value()
    ), order.pieces


def _etsy(order: Order, number: str) -> list[Row]:
    return [
        {
            "Sale Date": order.at.strftime("%m/%d/%y"),
            "Order ID": number,
            "Buyer User ID": "",
            "Full Name": order.customer,
            "Number of Items": str(order.pieces),
            "Order Value": f"{order.total:.2f}",
            "Shipping": f"{order.shipping:.2f}",
            "Order Total": f"{order.total + order.shipping:.2f}",
            "Status": ("Completed", "Canceled")[order.state],
        }
    ]


def _etsy_items(order: Order, number: str) -> list[Row]:
    return [
        {
            "Sale Date": order.at.strftime("%m/%d/%y"),
            "Item Name": line.title,
            "Buyer": order.customer,
            "Quantity": str(line.quantity),
            "Discount Amount": "$0.50",
            "Order Shipping": _dollars(Decimal(0) if position else order.shipping),
            "Order Sales Tax": "$0.00" if position else "$0.75",
            "Item Total": _dollars(line.price + Decimal("0.50")),
            "Order ID": number,
        }
        for position, line in enumerate(order.lines)
    ]


def _ebay(order: Order, number: str) -> list[Row]:
    shared = {
        "Sales Record Number": str(order.number % 1000),
        "Order Number": number,
        "Sale Date": order.at.strftime("%b-%d-%y"),
    }
    whole = {"Buyer Username": order.customer, "Total Price": _dollars(order.total + order.shipping)}
    items = [
        {
            **shared,
            **(whole if len(order.lines) == 1 else {"Buyer Username": "", "Total Price": ""}),
            "Item Number": str(3_000 + position),
            "Item Title": line.title,
            "Quantity": str(line.quantity),
            "Sold For": _dollars(line.price),
        }
        for position, line in enumerate(order.lines)
    ]
    if len(items) == 1:
        return items
    return [
        {
            **shared,
            **whole,
            "Item Number": "",
            "Item Title": "",
            "Quantity": str(order.pieces),
            "Sold For": _dollars(order.total),
        },
        *items,
    ]


def _shopee(names: Mapping[str, str], states: Sequence[str]) -> Callable[[Order, str], list[Row]]:
    def rows(order: Order, number: str) -> list[Row]:
        values = {
            "Order ID": number,
            "Order Status": states[order.state],
            "Order Creation Date": order.at.strftime("%Y-%m-%d %H:%M"),
            "Grand Total": f"{order.total + order.shipping:.2f}",
            "Username (Buyer)": order.customer,
        }
        items = [
            {"Product Name": line.title, "Quantity": str(line.quantity), "Deal Price": f"{line.price:.2f}"}
            for line in order.lines
        ]
        return [{names.get(name, name): value for name, value in {**values, **item}.items()} for item in items]

    return rows


SHOPEE_NAMES = {
    "Order ID": "訂單編號",
    "Order Status": "訂單狀態",
    "Order Creation Date": "訂單成立日期",
    "Grand Total": "買家總支付金額",
    "Username (Buyer)": "買家帳號",
    "Product Name": "商品名稱",
    "Quantity": "數量",
    "Deal Price": "商品活動價格",
}
SHOPEE_STATES = {
    "To ship": "To ship",
    "Shipping": "Shipping",
    "Completed": "Completed",
    "Cancelled": "Cancelled",
    "Return/Refund": "refunded",
}
SHOPEE_TAIWAN_STATES = {"待出貨": "待出貨", "運送中": "運送中", "完成": "已完成", "不成立": "已取消"}

LAZADA_STATES = {"pending": "pending", "shipped": "shipped", "delivered": "delivered", "confirmed": "completed"}


def _lazada(order: Order, number: str) -> list[Row]:
    return [
        {
            "orderItemId": f"{number}{position}",
            "orderNumber": number,
            "createTime": order.at.strftime("%d %b %Y %H:%M"),
            "customerName": order.customer,
            "paidPrice": f"{line.price:.2f}",
            "itemName": line.title,
            "status": list(LAZADA_STATES)[order.state] if line.counts else "canceled",
        }
        for position, line in enumerate(order.lines)
    ]


def _same(*words: str) -> dict[str, str | None]:
    return {word: word for word in words}


def _total_with_shipping(order: Order) -> tuple[Decimal, int]:
    return order.total + order.shipping, order.pieces


def _etsy_items_expected(order: Order) -> tuple[Decimal, int]:
    return order.total + order.shipping + Decimal("0.75"), order.pieces


def _lazada_expected(order: Order) -> tuple[Decimal, int]:
    return _counted(order)[0], len(order.counted)


NO_STATE: dict[str, str | None] = {"": None}
SHAPES: dict[str, Shape] = {
    "taobao": Shape(
        "taobao",
        HEADERS["taobao"],
        _same("等待买家付款", "买家已付款，等待卖家发货", "交易成功", "交易关闭"),
        _taobao,
        _whole,
        number="251{:016d}",
    ),
    "jd": Shape(
        "jd",
        HEADERS["jd"],
        {
            "等待出库": "等待出库",
            "等待确认收货": "等待确认收货",
            "完成": "已完成",
            "(删除)等待出库": "已取消",
            "已取消": "已取消",
            "锁定": "(锁定)等待出库",
        },
        _jd,
        _whole,
        number="{:012d}",
        never=frozenset({"订单类型"}),
    ),
    "pinduoduo": Shape(
        "pinduoduo",
        HEADERS["pinduoduo"],
        {"1": "待发货", "2": "已完成", "3": "退款成功", "4": "退款成功", "5": "已取消", "6": "已完成"},
        _pinduoduo,
        _whole,
        number="260701-{:015d}",
        customer="order",
    ),
    "douyin": Shape(
        "douyin",
        HEADERS["douyin"],
        _same("待发货", "已发货", "已完成"),
        _douyin,
        _counted,
        number="6920{:014d}",
        single_closed=True,
        shuffled=True,
        closed_state="已关闭",
    ),
    "alibaba_1688": Shape(
        "alibaba_1688",
        HEADERS["alibaba_1688"],
        _same("等待买家付款", "等待卖家发货", "交易成功", "交易关闭"),
        _alibaba,
        _total_with_shipping,
        number="18{:017d}",
    ),
    "xiaohongshu": Shape(
        "xiaohongshu",
        HEADERS["xiaohongshu"],
        _same("待配货", "已发货", "已完成"),
        _xiaohongshu,
        _counted,
        number="P7{:017d}",
        single_closed=True,
        closed_state="退款成功",
    ),
    "youzan": Shape(
        "youzan",
        HEADERS["youzan"],
        {"1": "待发货", "2": "已完成", "3": "交易关闭", "4": "已退款", "5": "已完成"},
        _youzan,
        lambda order: (order.total, None),
        number="E2026{:016d}",
    ),
    "shopify": Shape(
        "shopify",
        HEADERS["shopify"],
        {
            "1": "paid",
            "2": "completed",
            "3": "pending",
            "4": "refunded",
            "5": "voided",
            "6": "cancelled",
            "7": "completed",
        },
        _shopify,
        _whole,
        number="#{}",
        time_zone="America/Los_Angeles",
    ),
    "woocommerce": Shape("woocommerce", HEADERS["woocommerce"], WOOCOMMERCE_STATES, _woocommerce, _whole),
    "woocommerce_lines": Shape(
        "woocommerce_lines",
        HEADERS["woocommerce_lines"],
        WOOCOMMERCE_STATES,
        _woocommerce_lines,
        _total_with_shipping,
        precise="minute",
    ),
    "amazon_us": Shape(
        "amazon_us",
        HEADERS["amazon_us"],
        AMAZON_STATES,
        _amazon_all("Amazon.com"),
        _amazon_all_expected,
        number="111-{:07d}-1234567",
        customer="order",
        time_zone="UTC",
        separator="\t",
        encoding="utf-8",
        never=AMAZON_NEVER,
    ),
    "amazon_eu": Shape(
        "amazon_eu",
        HEADERS["amazon_eu"],
        AMAZON_STATES,
        _amazon_all("Amazon.de"),
        _amazon_all_expected,
        number="302-{:07d}-1234567",
        customer="order",
        time_zone="UTC",
        separator="\t",
        encoding="utf-8",
        never=AMAZON_NEVER,
    ),
    "amazon_jp": Shape(
        "amazon_jp",
        HEADERS["amazon_jp"],
        NO_STATE,
        _amazon_orders,
        _amazon_orders_expected,
        number="249-{:07d}-0000001",
        time_zone="Asia/Tokyo",
        separator="\t",
        encoding="utf-8",
    ),
    "etsy": Shape("etsy", HEADERS["etsy"], _same("Completed", "Canceled"), _etsy, _total_with_shipping, precise="day"),
    "etsy_items": Shape(
        "etsy_items", HEADERS["etsy_items"], NO_STATE, _etsy_items, _etsy_items_expected, precise="day"
    ),
    "ebay": Shape(
        "ebay",
        HEADERS["ebay"],
        NO_STATE,
        _ebay,
        _total_with_shipping,
        number="{:02d}-14934-88735",
        precise="day",
        encoding="utf-8",
        framed=True,
        never=frozenset({"Buyer Username", "Total Price"}),
    ),
    "shopee": Shape(
        "shopee",
        HEADERS["shopee"],
        SHOPEE_STATES,
        _shopee({}, list(SHOPEE_STATES)),
        _total_with_shipping,
        number="2607{:06d}ABCD",
        precise="minute",
    ),
    "shopee_taiwan": Shape(
        "shopee",
        HEADERS["shopee_taiwan"],
        SHOPEE_TAIWAN_STATES,
        _shopee(SHOPEE_NAMES, list(SHOPEE_TAIWAN_STATES)),
        _total_with_shipping,
        number="2607{:06d}EFGH",
        precise="minute",
    ),
    "lazada": Shape(
        "lazada",
        HEADERS["lazada"],
        LAZADA_STATES,
        _lazada,
        _lazada_expected,
        number="7{:014d}",
        time_zone="Asia/Manila",
        precise="minute",
        single_closed=True,
        closed_state="canceled",
    ),
}
