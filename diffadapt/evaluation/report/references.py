"""The papers that define the metrics, as they stand beside a score."""

PAPERS = {  # key of the registry -> authors, year, arXiv number
    "fid": "Heusel et al. 2017, arXiv:1706.08500",
    "fid_infinity": "Chong and Forsyth 2020, arXiv:1911.07023",
    "sfid": "Nash et al. 2021, arXiv:2103.03841",
    "clip_fid": "Kynkaanniemi et al. 2023, arXiv:2203.06026",
    "cmmd": "Jayasumana et al. 2024, arXiv:2401.09603",
    "authpct": "Alaa et al. 2022, arXiv:2102.08921",
    "fls": "Jiralerspong et al. 2023, arXiv:2302.04440",
    "kid": "Binkowski et al. 2018, arXiv:1801.01401",
    "kid_subsets": "Binkowski et al. 2018, arXiv:1801.01401",
    "inception_score": "Salimans et al. 2016, arXiv:1606.03498",
    "is_gap": "difference of Inception Scores (Salimans et al. 2016, arXiv:1606.03498)",
    "precision_recall": "Kynkaanniemi et al. 2019, arXiv:1904.06991",
    "density_coverage": "Naeem et al. 2020, arXiv:2002.09797",
    "msid": "Tsitsulin et al. 2020, arXiv:1905.11141",
    "vendi": "Friedman and Dieng 2023, arXiv:2210.02410",
    "clip_t": "Ruiz et al. 2023, arXiv:2208.12242; CLIP: arXiv:2103.00020",
    "clip_i": "Ruiz et al. 2023, arXiv:2208.12242; CLIP: arXiv:2103.00020",
    "dino": "Ruiz et al. 2023, arXiv:2208.12242; DINO: arXiv:2104.14294",
    "lpips_diversity": "Ruiz et al. 2023, arXiv:2208.12242; LPIPS: arXiv:1801.03924",
}
NO_PAPER = (
    "copy_rate",
    "preference",
)  # docs/metrics.md defines them; a model of preference has its own paper
