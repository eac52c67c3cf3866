"""一段历史：导入、撤回、人的改动、设置的改动与物化，以及 Hypothesis 怎样随机生成它们。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, TypeAlias, TypeVar
from uuid import UUID

from hypothesis import strategies as st

from etl_assets.ledger.graph import Asset
from etl_assets.testing.raw_data import SAMPLE_SHOP_NAME
from tests.integration.engine.chain import ASSETS

FIRST_DAY = date(2026, 1, 5)
DAYS = 4
LAST_DAY = FIRST_DAY + timedelta(days=DAYS - 1)
COLD_AFTER_DAYS = 1
"""四天里就能变冷又回暖。"""

OTHER_SHOP = UUID("00000000-0000-4000-8000-000000000002")
OTHER_SHOP_NAME = "二店"
UNKNOWN_SHOP_NAME = "没有这家"


# ---- 会发生的事 ------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """一次导入完成；它的事件随即到了，或者要迟到。"""

    rows: tuple[Mapping[str, Any], ...]
    completed_at: datetime | None
    is_announced: bool = True


@dataclass(frozen=True)
class Withdraw:
    """先前的一次导入被撤回，或撤回之后又恢复。"""

    which: int


@dataclass(frozen=True)
class Announce:
    """先前一次导入的事件到了：迟到的，或重复的。"""

    which: int


@dataclass(frozen=True)
class Touch:
    """人改了一个商机；应用随即说了一声（说的是商机，或者客户），或者没有说。"""

    which: int
    change: Mapping[str, Any]
    told: Literal["lead_ids", "customer_global_ids"] | None


@dataclass(frozen=True)
class Configure:
    """店铺改了名，或类型映射变了：受影响的日子要整天重跑。"""

    statement: str


@dataclass(frozen=True)
class Materialize:
    """某个时候，某人让几个资产的几天重算一遍，不管到没到期。"""

    first: int
    length: int
    assets: frozenset[str]

    @property
    def days(self) -> tuple[date, date]:
        first = FIRST_DAY + timedelta(days=self.first)
        return first, min(first + timedelta(days=self.length - 1), LAST_DAY)


@dataclass(frozen=True)
class Work:
    """一个工人把到期的做完。"""


@dataclass(frozen=True)
class Overtake:
    """`paused` 停在一处，`meanwhile` 接连发生，到做完或被锁拦住为止；然后它继续，或死在那里。

    :param stop: 第几条语句之前，或头一次写哪张表之前。
    """

    paused: Work | Materialize | Withdraw | Announce
    stop: int | str
    dies: bool
    meanwhile: tuple[Event, ...]


@dataclass(frozen=True)
class Together:
    """几件事同时发生，各在一个线程里；`in_processes` 时物化在别的进程里。"""

    events: tuple[Event, ...]
    in_processes: bool


Event: TypeAlias = Import | Withdraw | Announce | Touch | Configure | Materialize | Work
Change: TypeAlias = Event | Overtake | Together


@dataclass(frozen=True)
class Finish:
    """最后把到期的做完：一天一天的（按这个次序），还是一整段。店铺、映射变过的，由人重跑，还是由事件发现。"""

    by_person: bool
    day_by_day: bool
    order: tuple[int, ...]


@dataclass(frozen=True)
class History:
    """第一次导入做完之后，发生几件事，最后把到期的做完；extras 是三个真的资产之外，图里还有的。"""

    first: Import
    changes: tuple[Change, ...]
    finish: Finish
    extras: tuple[Asset, ...] = ()


# ---- 怎样生成 --------------------------------------------------------------------

T = TypeVar("T")


def _weighted(*choices: tuple[int, st.SearchStrategy[T]]) -> st.SearchStrategy[T]:
    """按权重选一个策略；one_of 会把重复的并成一个。"""
    return st.sampled_from([strategy for weight, strategy in choices for _ in range(weight)]).flatmap(
        lambda strategy: strategy
    )


_MOMENTS = st.sampled_from(
    [
        datetime(2026, 1, 5 + day, 16 * edge, tzinfo=UTC) - timedelta(microseconds=before)
        for day in range(DAYS - 1)
        for edge, before in ((0, 0), (1, 0), (1, 1))
    ]
)
_BAD_MOMENTS = st.sampled_from(
    [None, "infinity", "-infinity", datetime(1999, 12, 31, tzinfo=UTC), "0044-03-15 12:00:00+00 BC"]
)
_ROWS = st.fixed_dictionaries(
    {
        "order_id": st.sampled_from(["A", "B", "C", "A", "B", " A ", "A", "B", "a", None]),
        "shop": st.sampled_from(
            [SAMPLE_SHOP_NAME] * 12 + [OTHER_SHOP_NAME, f"{OTHER_SHOP_NAME}\u3000", UNKNOWN_SHOP_NAME]
        ),
        "customer_name": st.sampled_from(
            ["张三", "ABC", "李四", "张三", "ＡＢＣ", "李四", " ABC\u3000", "张 三", "张\u3000三", " "]
        ),
        "order_type": st.sampled_from(["大货订单", "打样订单", " 大货订单", "产前样订单", "没有映射", None, ""]),
        "order_status": st.sampled_from(
            ["completed", "new", "new", "COMPLETED\u3000", "cancelled", "new", "已退款", None, ""]
        ),
        "amount": st.sampled_from(["10.00", "0.05", "-3.10", None, "999999999999.99", "7.00", "8.00", "9.00", "NaN"]),
        "quantity": st.sampled_from([1, 7, 0, None, 1, 1, 1, 1, 1, 1, 1, -1]),
        "ordered_at": _weighted((15, _MOMENTS), (1, _BAD_MOMENTS)),
    }
)
_COMPLETED_AT = st.sampled_from([*[datetime(2026, 6, 1, hour, tzinfo=UTC) for hour in (1, 2, 2, 3)], None])


def _imports(is_announced: st.SearchStrategy[bool]) -> st.SearchStrategy[Import]:
    return st.builds(Import, st.lists(_ROWS, min_size=3, max_size=6).map(tuple), _COMPLETED_AT, is_announced)


_IMPORTS = _imports(st.sampled_from([True, True, True, False]))
_WITHDRAWALS = st.builds(Withdraw, st.integers(0, 2))
_ANNOUNCEMENTS = st.builds(Announce, st.integers(0, 2))
_TOUCHES = st.builds(
    Touch,
    st.integers(0, 5),
    st.one_of(
        st.builds(lambda moment: {"closed_by": "user", "closed_at": moment, "current_stage": "LOST"}, _MOMENTS),
        st.sampled_from(
            [
                {"owner": "王五"},
                {"notes": " 电话\n"},
                {"closed_by": None, "closed_at": None, "owner": None, "notes": None},
                {"closed_by": "user", "closed_at": None},
            ]
        ),
    ),
    st.sampled_from(["lead_ids", "customer_global_ids", None]),
)
_CONFIGURATIONS = st.sampled_from(
    [
        "UPDATE order_type_mappings SET system_order_type = 'SAMPLE' WHERE raw_order_type = '大货订单'",
        "UPDATE order_type_mappings SET system_order_type = '别的' WHERE raw_order_type = '打样订单'",
        "INSERT INTO order_type_mappings VALUES ('没有映射', 'PROOF') ON CONFLICT DO NOTHING",
        "UPDATE shop_configs SET shop_name = '没有这家' WHERE shop_name = '旗舰店'",
        "UPDATE shop_configs SET shop_name = '旗舰店' WHERE shop_name = '没有这家'",
        "DELETE FROM shop_configs WHERE shop_name = '二店'",
    ]
).map(Configure)
EXTRAS = ("extra_1", "extra_2", "extra_3")
_ASSETS = st.sampled_from(
    [frozenset(ASSETS + EXTRAS), *[frozenset([name]) for name in ASSETS], frozenset(EXTRAS[:1]), frozenset(EXTRAS[1:])]
)
_MATERIALIZATIONS = st.builds(Materialize, st.integers(0, DAYS - 1), st.integers(1, DAYS), _ASSETS)
_WORK = st.just(Work())
_DATA_CHANGES = _weighted((5, _IMPORTS), (2, _WITHDRAWALS), (1, _ANNOUNCEMENTS), (3, _TOUCHES), (1, _CONFIGURATIONS))
_RUNS = _weighted((2, _WORK), (1, _MATERIALIZATIONS))

# 读完了、还没写：较旧的快照正是在这里盖过较新的
_ASSETS_AND_THEIR_TABLES = [
    ("orders", "public.orders"),
    ("customers", "public.customers"),
    ("leads", "public.business_leads"),
]
_READERS = st.sampled_from(_ASSETS_AND_THEIR_TABLES).flatmap(
    lambda asset_and_table: st.builds(
        Overtake,
        st.builds(
            Materialize, st.just(0), st.sampled_from([DAYS, DAYS, 1, 2]), st.just(frozenset([asset_and_table[0]]))
        ),
        st.just(asset_and_table[1]),
        st.just(False),
        st.tuples(_DATA_CHANGES, _WORK),
    )
)
_ANYWHERE = st.builds(
    Overtake,
    _weighted((2, _WORK), (3, _MATERIALIZATIONS), (1, _WITHDRAWALS), (1, _ANNOUNCEMENTS)),
    # 一个资产大约发这么多条语句
    st.sampled_from(range(1, 31)),
    st.booleans(),
    st.tuples(_DATA_CHANGES, _RUNS),
)
_OVERTAKES = _weighted((1, _READERS), (1, _ANYWHERE))
_TOGETHER = st.builds(
    Together, st.lists(_weighted((1, _DATA_CHANGES), (2, _RUNS)), min_size=2, max_size=3).map(tuple), st.booleans()
)


def _extras(count: int) -> st.SearchStrategy[tuple[Asset, ...]]:
    """每一个的上游，是它前面的几个。"""
    above = [[*ASSETS, *EXTRAS[:number]] for number in range(count)]
    upstreams = st.tuples(*(st.frozensets(st.sampled_from(names), min_size=1, max_size=3) for names in above))
    return upstreams.map(lambda drawn: tuple(Asset(name, of) for name, of in zip(EXTRAS, drawn, strict=False)))


HISTORIES = st.builds(
    History,
    _imports(st.just(True)),
    st.lists(
        _weighted((3, _OVERTAKES), (5, _DATA_CHANGES), (1, _MATERIALIZATIONS), (1, _TOGETHER)), min_size=2, max_size=3
    ).map(tuple),
    st.builds(Finish, st.booleans(), st.sampled_from([False, False, True]), st.permutations(range(DAYS)).map(tuple)),
    st.sampled_from([0, 0, 1, 2, 3, 3]).flatmap(_extras),
)
