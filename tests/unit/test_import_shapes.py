"""样子各异的文本文件：读对，或者一句真话拒绝。文件由别的写手写成，不用我们自己的代码。"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from bridge.imports.files import encoding
from bridge.imports.files.cells import Source
from bridge.imports.files.source import open_source
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import merge_problems
from bridge.imports.rules.profile import FileFormat

HEADER = "order_id,shop,customer_name,amount\n"
ORDERS = "A1,店,王伟,12.50\nA2,店,李娜,8\n"
CHINESE = "订单编号,店铺,买家昵称,备注\nA1,云锦店,王伟,加急发货\nA2,云锦店,李娜,周末送到\n"
JAPANESE = "注文番号,店舗,購入者,備考\nA1,本店,佐藤 花子,ギフト\nA2,本店,ﾔﾏﾀﾞ ﾀﾛｳ,急ぎ\n"
TAIWANESE = "訂單編號,店鋪,買家,備註\nA1,旗艦店,陳怡君,請盡快出貨\nA2,旗艦店,林志明,週末送達\n"
GERMAN = "Bestellnummer,Laden,Käufer,Notiz\nA1,Müller,Jörg Maß,für €5\nA2,Müller,Ümit Çelik,\n"


def opened(
    folder: Path, content: str | bytes, file: FileFormat | None = None
) -> tuple[Source, list[tuple[object, ...]]]:
    path = folder / "orders.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = open_source(path, file or FileFormat())
    blocks = list(source.blocks)
    assert merge_problems([problem for block in blocks for problem in block.problems]).is_empty()
    return source, pl.concat([block.cells for block in blocks]).rows()


def refused(folder: Path, content: str | bytes, file: FileFormat | None = None) -> str:
    with pytest.raises(ImportFileError) as caught:
        opened(folder, content, file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "codec", "label"),
    [
        (CHINESE, "utf-8", "UTF-8"),
        (CHINESE, "utf-8-sig", "UTF-8"),
        (CHINESE, "utf-16", "UTF-16"),
        (CHINESE, "utf-16-le", "UTF-16-LE"),
        (CHINESE, "utf-16-be", "UTF-16-BE"),
        (CHINESE, "utf-32", "UTF-32"),
        (CHINESE, "gb18030", "GB18030"),
        (TAIWANESE, "big5", "Big5"),
        (JAPANESE, "cp932", "Shift_JIS"),
        (JAPANESE, "iso2022_jp_ext", "ISO-2022-JP"),
        (GERMAN, "cp1252", "Windows-1252"),
    ],
)
def test_encodings_are_found_and_said(tmp_path: Path, text: str, codec: str, label: str) -> None:
    source, rows = opened(tmp_path, text.encode(codec))
    expected = [line.split(",") for line in text.splitlines()]
    assert list(source.columns) == expected[0]
    assert rows == [(2, *expected[1]), (3, *(cell or None for cell in expected[2]))]
    assert str(source.shape) == f"text, {label}, comma, header in row 1"


def test_text_that_two_encodings_fit_is_refused_with_both_readings(tmp_path: Path) -> None:
    content = "no,who\n1,高峰\n".encode("gb18030")
    assert refused(tmp_path, content) == (
        "orders.csv: the text can be read as GB18030 ('高峰') and as EUC-KR ('멕룟'); nothing was imported: "
        "say which is right with --encoding gb18030 or --encoding cp949"
    )
    assert opened(tmp_path, content, FileFormat(encoding="gb18030"))[1] == [(2, "1", "高峰")]


def test_half_width_katakana_alone_could_be_chinese(tmp_path: Path) -> None:
    assert "as Shift_JIS ('ﾔﾏﾀﾞ')" in refused(tmp_path, "no,who\n1,ﾔﾏﾀﾞ\n".encode("cp932"))


def test_an_encoding_that_is_not_known_is_proposed_but_not_taken(tmp_path: Path) -> None:
    content = "Номер,Клиент,Сумма\n1,Иванов Иван,5\n2,Петрова Анна,6\n".encode("cp1251")
    assert "the encoding of the text is not clear; as CP1251 it begins 'Номер'; nothing was imported" in refused(
        tmp_path, content
    )
    polish = "no,who\n1,Łukasz Wiśniewski\n2,Paweł Kamiński\n".encode("cp1250")
    assert "the encoding of the text is not clear" in refused(tmp_path, polish)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("quoted", [False, True])
def test_line_ends_of_every_kind(tmp_path: Path, line_end: str, quoted: bool) -> None:
    name = '"王\n伟"' if quoted else "王伟"
    text = f"a,b\n1,{name}\n\n2,李\n".replace("\n", line_end)
    rows = opened(tmp_path, text)[1]
    inside = f"王{line_end}伟" if quoted else "王伟"
    assert rows == [(2, "1", inside), (5 if quoted else 4, "2", "李")]


def test_mixed_line_ends(tmp_path: Path) -> None:
    assert opened(tmp_path, "a,b\r\n1,x\n2,y\r3,z\r\r\n4,w")[1] == [
        (2, "1", "x"),
        (3, "2", "y"),
        (4, "3", "z"),
        (5, "4", "w"),
    ]


def test_the_first_line_of_excel_names_the_separator(tmp_path: Path) -> None:
    source, rows = opened(tmp_path, 'sep=|\r\na|b;c|d\r\n1|2;3|"x|y"\r\n')
    assert (source.columns, rows) == (("a", "b;c", "d"), [(3, "1", "2;3", "x|y")])


def test_decimal_commas_do_not_outvote_the_separator(tmp_path: Path) -> None:
    rows = "".join(f"{n};Anna, Berlin, Mitte;1.234,50\n" for n in range(9))
    assert opened(tmp_path, "no;who;paid\n" + rows)[0].shape.separator == ";"


def test_titles_above_totals_below_and_repeated_headers_are_left_out(tmp_path: Path) -> None:
    title = "订单导出,,,\n店铺：云锦店,导出时间：2026-06-03,,\n\n"
    total = "小计,,,20.50\n"
    text = title + HEADER + ORDERS + total + HEADER + "A3,店,张,1\n" + " 合 计：,-,-,21.50\n"
    source, rows = opened(tmp_path, text)
    assert rows == [(5, "A1", "店", "王伟", "12.50"), (6, "A2", "店", "李娜", "8"), (9, "A3", "店", "张", "1")]
    assert str(source.shape) == (
        "text, UTF-8, comma, header in row 4, 2 total rows left out, 1 repeated header left out"
    )
    kept = opened(tmp_path, text, FileFormat(keep_totals=True))[1]
    assert [row[1] for row in kept] == ["A1", "A2", "小计", "A3", " 合 计："]


@pytest.mark.parametrize("name", ["共1单", '"共 1,204 笔订单"', "総計", "Grand Total:"])
def test_a_total_is_called_many_things(tmp_path: Path, name: str) -> None:
    source, rows = opened(tmp_path, f"{HEADER}{ORDERS}{name},,,20.50\n")
    assert (len(rows), source.shape.total_rows) == (2, 1)


def test_files_joined_end_to_end_keep_no_mark_within(tmp_path: Path) -> None:
    part = ("\ufeff" + HEADER + ORDERS).encode()
    source, rows = opened(tmp_path, part + part.replace(b"A", b"B"))
    assert [row[1] for row in rows] == ["A1", "A2", "B1", "B2"]
    assert source.shape.repeated_headers == 1


@pytest.mark.parametrize("name", ["Total", "总计", "Summe"])
def test_a_full_row_is_no_total_whatever_its_name(tmp_path: Path, name: str) -> None:
    assert opened(tmp_path, f"customer_name,order_id,shop,amount\n{name},A1,店,5\n")[1] == [(2, name, "A1", "店", "5")]


def test_the_row_of_the_header_can_be_told(tmp_path: Path) -> None:
    text = "the,first,line\nno,who,paid\n1,x,2\n"
    assert opened(tmp_path, text)[0].columns == ("the", "first", "line")
    assert opened(tmp_path, text, FileFormat(header_row=2))[0].columns == ("no", "who", "paid")
    assert "there is no header in row 9" in refused(tmp_path, text, FileFormat(header_row=9))


def test_a_header_is_no_row_with_numbers(tmp_path: Path) -> None:
    assert opened(tmp_path, "a,b,,\n1,2,3,4\n5,6,7,8\n")[0].columns == ("a", "b", "column_3", "column_4")


def test_trailing_delimiters_are_no_column(tmp_path: Path) -> None:
    assert opened(tmp_path, "a,b,\n1,2,\n3,4,,,\n")[1] == [(2, "1", "2", None), (3, "3", "4", None)]
    assert opened(tmp_path, "a,b\n1,2,\n3,4,,,\n")[1] == [(2, "1", "2"), (3, "3", "4")]


def test_quotes_that_mean_nothing(tmp_path: Path) -> None:
    """亚马逊的 TSV 不用引号；商品名以引号开头。"""
    text = 'no\tproduct\tpaid\n1\t"限定" マグ\t5\n2\t5" パイプ\t6\n3\t"開いたまま\t7\n4\tx\t8\n'
    source, rows = opened(tmp_path, text)
    assert [row[2] for row in rows] == ['"限定" マグ', '5" パイプ', '"開いたまま', "x"]
    assert str(source.shape) == "text, UTF-8, tab, no quotes, header in row 1"


def test_quotes_late_in_a_large_file_count_too(tmp_path: Path) -> None:
    plain = "".join(f"{n},x,y\n" for n in range(60_000))
    assert opened(tmp_path, "a,b,c\n" + plain + '1,"p,q",r\n')[1][-1] == (60_002, "1", "p,q", "r")
    assert opened(tmp_path, "a,b,c\n" + plain + '1,"p" q,r\n2,"s,t\n')[1][-1] == (60_003, "2", '"s', "t")


def test_two_readings_of_quotes_that_both_fit_are_refused(tmp_path: Path) -> None:
    text = 'a\tb\tc\n1\t"x\t5\n2\ty"\t6\n'
    assert "with quotes around fields the file has 2 records, without 3, and both fit" in refused(tmp_path, text)
    assert opened(tmp_path, text, FileFormat(quotes=False))[1] == [(2, "1", '"x', "5"), (3, "2", 'y"', "6")]
    assert opened(tmp_path, text, FileFormat(quotes=True))[1] == [(2, "1", "x\t5\n2\ty", "6")]


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
@pytest.mark.parametrize("titles", ["", "王伟\n", "王伟\n订单\n", "王伟\n订单\n三月\n"])
def test_two_readings_below_titles_are_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, titles: str, block_bytes: int
) -> None:
    """有几个字段由表说，不由上面的标题说，哪怕标题的行数更多。"""
    monkeypatch.setattr(encoding, "BLOCK_BYTES", block_bytes)
    text = f'sep=,\n{titles}订单编号,买家,金额,备注\nA0,王伟,12.50,"\nA1,王伟,12.50,"\n'
    assert "and both fit" in refused(tmp_path, text)


def test_one_damaged_quote_in_a_quoted_file_stays_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text('a,b\n"1","x"\n"2","y"z\n"3","w"\n')
    block = next(open_source(path, FileFormat()).blocks)
    assert [row[:3] for row in merge_problems(block.problems).rows()] == [(3, "b", "has text after its closing quote")]


def test_too_many_columns_are_refused_early(tmp_path: Path) -> None:
    assert "the table has 100,000 columns; at most 2,000 can be read" in refused(
        tmp_path, ",".join(["x"] * 100_000) + "\n"
    )
