"""etl import 的基准。"""
