"""Names and parameters that programs written for PyPI `effdet` rely on."""

from __future__ import annotations

import importlib
import inspect

import pytest

MODULES = {
    "effdet.data": """
        create_dataset DetectionDatset DetectionDataset SkipSubset resolve_input_config
        create_loader create_parser ImageToNumpy ImageToTensor clip_boxes_ clip_boxes ResizePad
        RandomResizePad RandomFlip resolve_fill_color Compose transforms_coco_eval
        transforms_coco_train IMAGENET_DEFAULT_MEAN IMAGENET_DEFAULT_STD IMAGENET_INCEPTION_MEAN
        IMAGENET_INCEPTION_STD random math deepcopy Image np torch""",
    "effdet.data.loader": "MAX_NUM_INSTANCES DetectionFastCollate PrefetchLoader create_loader",
    "effdet.data.parsers": "create_parser CocoParserCfg VocParserCfg OpenImagesParserCfg",
    "effdet.data.random_erasing": "RandomErasing",
    "effdet.evaluator": """
        Evaluator CocoEvaluator TfmEvaluator PascalEvaluator OpenImagesEvaluator
        create_evaluator""",
    "effdet.evaluation": "",
    "effdet.distributed": """
        get_world_size get_rank get_local_rank get_local_size is_main_process synchronize
        all_gather gather shared_random_seed reduce_dict all_gather_container gather_container""",
}


@pytest.mark.parametrize("module", MODULES)
def test_names(module):
    names = set(MODULES[module].split())
    assert names <= set(dir(importlib.import_module(module)))


SIGNATURES = [
    "data.DetectionDatset(data_dir, parser=None, parser_kwargs=None, transform=None)",
    "data.SkipSubset(dataset, n=2)",
    "data.create_dataset(name, root, splits=('train', 'val'))",
    "data.create_parser(name, **kwargs)",
    "data.resolve_input_config(args, model_config=None, model=None)",
    "data.ResizePad(target_size, interpolation='bilinear', fill_color=(0, 0, 0))",
    "data.RandomResizePad(target_size, scale=(0.1, 2.0), interpolation='random', "
    "fill_color=(0, 0, 0))",
    "data.RandomFlip(horizontal=True, vertical=False, prob=0.5)",
    "data.transforms_coco_eval(img_size=224, interpolation='bilinear', use_prefetcher=False, "
    "fill_color='mean', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))",
    "data.transforms_coco_train(img_size=224, interpolation='random', use_prefetcher=False, "
    "fill_color='mean', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))",
    "data.loader.DetectionFastCollate(instance_keys=None, instance_shapes=None, "
    "instance_fill=-1, max_instances=100, anchor_labeler=None)",
    "data.create_loader(dataset, input_size, batch_size, is_training=False, use_prefetcher=True, "
    "re_prob=0.0, re_mode='pixel', re_count=1, interpolation='bilinear', fill_color='mean', "
    "mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), num_workers=1, distributed=False, "
    "pin_mem=False, anchor_labeler=None, transform_fn=None, collate_fn=None, device=None)",
    "data.loader.PrefetchLoader(loader, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), "
    "re_prob=0.0, re_mode='pixel', re_count=1, device=None)",
    "data.random_erasing.RandomErasing(probability=0.5, min_area=0.02, max_area=0.25, "
    "min_aspect=0.3, max_aspect=None, mode='const', min_count=1, max_count=None, num_splits=0, "
    "device='cuda')",
    "data.parsers.CocoParserCfg(ann_filename, include_masks=False, include_bboxes_ignore=False, "
    "has_labels=True, bbox_yxyx=True, min_img_size=32, ignore_empty_gt=False)",
    "data.parsers.VocParserCfg(split_filename, ann_filename, img_filename='%s.jpg', "
    "keep_difficult=True, classes=None, add_background=True, has_labels=True, bbox_yxyx=True, "
    "min_img_size=32, ignore_empty_gt=False)",
    "data.parsers.OpenImagesParserCfg(categories_filename, img_info_filename, bbox_filename, "
    "img_label_filename='', masks_filename='', img_filename='%s.jpg', task='obj', "
    "prefix_levels=1, add_background=True, has_labels=True, bbox_yxyx=True, min_img_size=32, "
    "ignore_empty_gt=False)",
    "evaluator.CocoEvaluator(dataset, distributed=False, pred_yxyx=False)",
    "evaluator.create_evaluator(name, dataset, distributed=False, pred_yxyx=False)",
    "distributed.reduce_dict(input_dict, average=True)",
    "distributed.gather(data, dst=0, group=None)",
    "distributed.all_gather_container(container, group=None, cat_dim=0)",
]


@pytest.mark.parametrize("expected", SIGNATURES)
def test_parameters_begin_as_the_contract(expected):
    """Further parameters may follow, with a default."""
    path, _, parameters = expected.partition("(")
    module, _, name = path.rpartition(".")
    public = getattr(importlib.import_module(f"effdet.{module}"), name)
    ours = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(public).parameters.values()
    ]
    text = ", ".join(str(parameter) for parameter in ours)
    assert text.startswith(parameters[:-1])
    count = len(inspect.signature(eval(f"lambda {parameters[:-1]}: 0")).parameters)
    assert all(parameter.default is not parameter.empty for parameter in ours[count:])
