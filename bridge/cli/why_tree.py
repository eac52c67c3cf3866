"""`etl why` 的答案给人看的样子：一棵树；不在终端里是缩进的行，不上色。"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.tree import Tree

from bridge.cli.options import console
from bridge.cli.output import cell, say
from bridge.cli.tables import readable

Record = dict[str, Any]

_STYLES = {
    "loaded": "green",
    "rejected": "red",
    "held": "red",
    "withdrawn": "yellow",
    "waiting": "yellow",
    "outside": "yellow",
    "due": "yellow",
    "retry": "yellow",
}
_ABSENT = {
    "waiting": "it waits to be made",
    "pending": "its import is not completed",
    "outside": "it is left to the other system (ETL_ROLLOUT)",
}
_SETTLED = ("done", "idle")
_VALUES = ("day", "customer_name", "order_status", "order_type", "amount", "quantity")
_CELL_CHARACTERS = 60


@dataclass
class Node:
    """一句话，与挂在它下面的。"""

    text: str
    style: str = ""
    children: list[Node] = field(default_factory=list)


def print_tree(node: Node) -> None:
    if not sys.stdout.isatty():
        for depth, text in _lines(node):
            say("  " * depth + text)
        return
    tree = Tree(cell(node.text, node.style))
    _grow(tree, node.children)
    console().print(tree)


def _grow(tree: Tree, children: Iterable[Node]) -> None:
    for child in children:
        _grow(tree.add(cell(child.text, child.style)), child.children)


def _lines(node: Node, depth: int = 0) -> Iterator[tuple[int, str]]:
    yield depth, " ".join(node.text.split("\n"))
    for child in node.children:
        yield from _lines(child, depth + 1)


# ---- 一问一棵 ----------------------------------------------------------------------


def order_trees(answer: Record) -> list[Node]:
    return [_order(order) for order in answer["orders"]]


def customer_trees(answer: Record) -> list[Node]:
    return [
        Node(
            f"customer {customer['customer_nickname']} of {customer['shop'] or customer['shop_id']}",
            "bold",
            [
                Node(_figures(customer) + f", id {customer['customer_global_id']}"),
                *_written(customer),
                _orders("newest orders", customer["newest_orders"]),
                *[_lead(lead) for lead in customer["leads"]],
                *_made(customer["days"], customer["running"]),
            ],
        )
        for customer in answer["customers"]
    ]


def lead_trees(answer: Record) -> list[Node]:
    customer, node = answer["customer"], _lead(answer["lead"])
    of_whom = (
        f"customer {customer['customer_nickname']} of {customer['shop']}: {_figures(customer)}"
        if customer
        else "its customer is not in customers"
    )
    orders = _orders("its orders", answer["orders"])
    if answer["earlier_orders"]:
        orders.children.append(Node(f"and {answer['earlier_orders']} earlier ones"))
    node.style = "bold"
    node.children += [Node(of_whom), *_written(answer["lead"]), orders, *_made(answer["days"], answer["running"])]
    return [node]


def import_trees(answer: Record) -> list[Node]:
    task, rows = answer["import"], answer["rows"]
    waiting = [
        Node(f"{_event(event)}: waits for this import to be completed", "yellow") for event in answer["waiting_events"]
    ]
    if task is None:
        return [Node(f"import {answer['import_id']} is not in import_tasks", "bold", waiting)]
    node = _import(task)
    node.style = "bold"
    if rows and task["status"] == "completed":
        node.children.append(
            Node(", ".join(f"{name} {rows[name]}" for name in rows), "yellow" if rows["waiting"] else "")
        )
    elif rows:
        node.children.append(Node(f"{rows['raw']} rows, none of them counts"))
    days = _made(answer["days"], answer["running"])
    shown = len({row["day"] for row in answer["days"]})
    if answer["asked_days"] > shown:
        days.append(Node(f"and {answer['asked_days'] - shown} earlier days"))
    node.children += [*waiting, *[Node(f"taken in by {_run(run)}") for run in answer["runs"]]]
    node.children += [*_rejected(answer["rejected"]), *days]
    return [node]


def day_trees(answer: Record) -> list[Node]:
    account = answer["account"]
    imports = [_import(task) for task in answer["imports"]]
    if answer["more_imports"]:
        imports.append(Node("and earlier ones"))
    runs = [Node(f"{readable(run['made_at'])} {', '.join(run['assets'])}: {_run(run)}") for run in answer["runs"]]
    counted = [Node("rows: " + ", ".join(f"{name} {count}" for name, count in account.items()))] if account else []
    asked = Node("imports that asked for it, newest first" if imports else "no import asked for it", "bold", imports)
    made = [Node("runs that made it, newest first", "bold", runs)] if runs else []
    children = [*_made(answer["assets"], answer["running"]), *counted, *_rejected(answer["rejected"]), asked, *made]
    return [Node(f"day {answer['day']}{'' if answer['is_partition'] else ' (not a partition)'}", "bold", children)]


# ---- 枝叶 --------------------------------------------------------------------------


def _order(order: Record) -> Node:
    row = order["row"]
    if row:
        says = [row["customer_nickname"], row["latest_status"], row["system_order_type"], row["amount"]]
        is_in = Node(
            f"in orders on {row['order_date']}: {_joined([*says, _pieces(row['quantity'])])}", "green", _written(row)
        )
    else:
        states = {version["state"] for version in order["versions"]}
        because = next((says for state, says in _ABSENT.items() if state in states), "no valid row is left")
        is_in = Node(f"not in orders: {because}", "yellow")
    imports = {task["import_id"]: task for task in order["imports"]}
    rows = [_version(version, imports.get(version["import_id"])) for version in reversed(order["versions"])]
    if order["older_versions"]:
        rows.append(Node(f"and {order['older_versions']} older ones"))
    of_whom = [_customer_of_order(customer) for customer in order["customers"]]
    shop = order["shop"] or (str(order["shop_id"]) if order["shop_id"] else "no shop")
    title = f"order {order['order_id']} of {shop}"
    children = [is_in, Node("rows that name it, newest first", "bold", rows), *of_whom]
    return Node(title, "bold", [*children, *_made(order["days"], order["running"])])


def _version(version: Record, task: Record | None) -> Node:
    state = version["state"]
    children = [Node(_joined(_pieces(version[name]) if name == "quantity" else version[name] for name in _VALUES))]
    if version["changed"]:
        changes = [f"{name} {_short(old)} → {_short(new)}" for name, (old, new) in version["changed"].items()]
        children.append(Node("changed: " + ", ".join(changes)))
    text = f"{state}: {_place(version)} of {_file(task) if task else 'an import that is gone'}: {version['because']}"
    return Node(text, _STYLES.get(state, ""), [*children, *(_import(task).children if task else [])])


def _place(version: Record) -> str:
    """文件的第几行；不知道的（0015 以前导入的），存下的第几行。"""
    if version["file_row"]:
        return f"row {version['file_row']:,}"
    return f"stored row {version['place']:,}" if version["place"] else f"raw_id {version['raw_id']}"


def _import(task: Record) -> Node:
    """一次导入，下面挂着它的编号与事件。"""
    completed = f"completed {readable(task['completed_at'])}" if task["completed_at"] else "not completed"
    of_day = f", {task['rows_of_day']} rows of this day" if task.get("rows_of_day") else ""
    event = _event(task["event"]) if task["event"] else "no event of it was handled"
    says = f"import {task['import_id']}, {task['status']}, {task['row_count']} rows, {completed}"
    return Node(_file(task) + of_day, _STYLES.get(task["status"], ""), [Node(says), Node(event)])


def _file(task: Record) -> str:
    return task["source_name"] or f"import {task['import_id']}"


def _event(event: Record) -> str:
    where = (
        f"sequence {event['stream_sequence']} of EVENTS" if event["stream_sequence"] else "taken in without an event"
    )
    times = [f"{name} {readable(event[f'{name}_at'])}" for name in ("stored", "handled") if event.get(f"{name}_at")]
    return ", ".join([f"event {event['event_id']}", where, *times])


def _customer_of_order(customer: Record) -> Node:
    own = "" if customer["is_current"] else "earlier "
    lead_no = customer.get("lead_no_of_order")
    leads = [_lead(lead) for lead in customer["leads"] if _concerns(lead, lead_no)]
    in_lead = f", lead {lead_no} has this order" if lead_no else ""
    text = f"{own}customer {customer['customer_nickname']}: {_figures(customer)}{in_lead}"
    return Node(text, children=[Node(f"id {customer['customer_global_id']}"), *leads])


def _concerns(lead: Record, lead_no: int | None) -> bool:
    """这一单的商机，与人碰过的。"""
    return bool(lead["lead_no"] == lead_no or lead["written_by_person"])


def _lead(lead: Record) -> Node:
    by_person = []
    if lead["closed_by_person"]:
        by_person.append(f"a person closed it on {readable(lead['closed_at'])}: later orders go to the next lead")
    by_person += [
        f"a person wrote its {name}"
        for name, wrote in (("owner", lead["owner"]), ("notes", lead["has_notes"]))
        if wrote
    ]
    dates = f", {readable(lead['opened_at'])} to {readable(lead['last_order_at'])}" if lead["opened_at"] else ""
    text = f"lead {lead['lead_no']}: {lead['current_stage']}, {lead['order_count']} orders{dates}"
    return Node(text, children=[Node(f"id {lead['lead_id']}"), *[Node(says, "yellow") for says in by_person]])


def _orders(title: str, orders: Iterable[Record]) -> Node:
    lines = [Node(_order_line(order)) for order in orders]
    return Node(title if lines else "no orders", "bold", lines)


def _order_line(order: Record) -> str:
    says = [order["order_date"], order["latest_status"], order["system_order_type"], order["amount"]]
    return f"{order['order_id']}: {_joined([*says, _pieces(order['quantity']), order.get('source_name')])}"


def _figures(customer: Record) -> str:
    return f"{customer['order_count']} orders, {customer['total_amount']}"


def _rejected(rules: Iterable[Record]) -> list[Node]:
    return [
        Node(
            f"rejected by {rule['rule']}: {rule['rows']} rows"
            + (f", such as {', '.join(map(_short, rule['examples']))}" if rule["examples"] else ""),
            "red",
        )
        for rule in rules
    ]


def _written(row: Record) -> list[Node]:
    by = f"by {_run(row['run'])}" if row["run"] else "by a run that is not known"
    return [Node(f"written {readable(row['updated_at'])} {by}")]


def _run(run: Record) -> str:
    says = [run["trigger"], run["status"], f"worker {run['worker']}" if run["worker"] else None, run["scope"]]
    return f"run {run['url'] or run['run_id']} ({_joined(says, ', ')})"


def _made(assets: Iterable[Record], running: Iterable[Record]) -> list[Node]:
    """每一天一条：一个运行做好的几个资产合成一句，没做好的一个资产一句。"""
    nodes: dict[Any, dict[tuple[Any, ...], list[Record]]] = {}
    for asset in assets:
        by_run = nodes.setdefault(asset["day"], {})
        by_run.setdefault((asset["state"], asset["run_id"], asset["since"], asset["held_reason"]), []).append(asset)
    days = []
    for day, by_run in nodes.items():
        is_due = any(state not in _SETTLED for state, *_ in by_run)
        of_assets = [Node(_of_assets(alike), _STYLES.get(alike[0]["state"], "")) for alike in by_run.values()]
        days.append(Node(f"day {day}: {'due' if is_due else 'nothing is due'}", "bold", of_assets))
    now = [
        Node(f"running since {readable(run['acquired_at'])}: run {run['url'] or run['run_id']}, worker {run['worker']}")
        for run in running
    ]
    return [*days, *now]


def _of_assets(assets: list[Record]) -> str:
    """同一个运行做的、同样到期的几个资产。"""
    names, last = ", ".join(asset["asset"] for asset in assets), assets[-1]
    made = (
        f"made {readable(last['made_at'])} by run {last['url'] or last['run_id']}" if last["run_id"] else "never made"
    )
    if last["state"] in _SETTLED:
        return f"{names}: {made}"
    says = f"due since {readable(last['since'])}"
    if last["state"] == "held":
        says += f", held: {last['held_reason']}; `etl backfill` asks for it again"
    if last["failed_run_id"]:
        says += f", failed {last['failures']} times, last in run {last['failed_url'] or last['failed_run_id']}"
    if last["state"] == "retry":
        says += f", tried again {readable(last['retry_at'])}"
    return f"{names}: {says}; {made}"


def _pieces(quantity: int | None) -> str | None:
    return None if quantity is None else f"× {quantity}"


def _joined(values: Iterable[Any], separator: str = " · ") -> str:
    return separator.join(_short(value) for value in values if value is not None)


def _short(value: Any) -> str:
    """买家的文字可能有一兆长。"""
    text = "nothing" if value is None else str(value)
    return f"{text[:_CELL_CHARACTERS]}…" if len(text) > _CELL_CHARACTERS else text
